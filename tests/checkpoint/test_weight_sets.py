"""Folders with several sets of weights: what transformers would load is read, and differences are reported."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import checkpoints
from torch import Tensor

from llamaconv import RefusedError, Target, convert_checkpoint, make_plan, open_checkpoint
from llamaconv.checkpoint.checkpoint import Checkpoint
from llamaconv.checkpoint.folder import LocalFolder

INDEX = "model.safetensors.index.json"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n"


def doubled(role: str = "norm") -> dict[str, Tensor]:
    """The same model with other values in its norms, or in the tensors of another role."""
    return {n: w * 2 if role in n else w for n, w in checkpoints.tensors().items()}


def add(folder: Path, name: str, weights: dict[str, Tensor]) -> Path:
    """Adds one file of a kind, or an index with two shards."""
    if name.endswith("index.json"):
        weight_map = {}
        for number in range(2):
            part = dict(list(weights.items())[number::2])
            stem = name.partition(".")[0]
            ending = "bin" if ".bin." in name else "safetensors"
            file = f"{stem}-{number + 1:05d}-of-00002.{ending}"
            add(folder, file, part)
            weight_map.update(dict.fromkeys(part, file))
        (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    elif name.endswith(".bin"):
        torch.save(weights, folder / name)
    else:
        save_file(weights, folder / name)
    return folder


def empty(folder: Path) -> Path:
    checkpoints.write(folder, shards=1)
    (folder / "model.safetensors").unlink()
    return folder


def is_doubled(checkpoint: Checkpoint) -> bool:
    """Whether the file that was taken is one of `doubled`."""
    (file,) = checkpoint.tensors["model.norm.weight"].files
    path = checkpoint.folder / file
    state = load_file(path) if path.suffix == ".safetensors" else torch.load(path)  # type: ignore[union-attr]
    expected = doubled()["model.norm.weight"]
    return bool(torch.equal(state["model.norm.weight"], expected))


IN_ORDER = ("model.safetensors", INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")


@pytest.mark.parametrize("first", range(3))
def test_order_is_that_of_transformers_and_a_difference_is_a_warning(
    tmp_path: Path, first: int
) -> None:
    folder = empty(tmp_path / "hf")
    add(folder, IN_ORDER[first], doubled())
    add(folder, IN_ORDER[first + 1], checkpoints.tensors())
    checkpoint = open_checkpoint(folder)
    assert is_doubled(checkpoint)
    (said,) = checkpoint.problems
    assert said.level == "warning"
    assert f"{IN_ORDER[first]} and {IN_ORDER[first + 1]}" in said.message
    assert f"{folder / IN_ORDER[first + 1]}" in said.message, "the remedy"
    assert not is_doubled(open_checkpoint(folder / IN_ORDER[first + 1]))


def test_order_is_what_transformers_resolves(tmp_path: Path) -> None:
    """The oracle: transformers' own choice among all four, with the first taken away in turn."""
    modeling = pytest.importorskip("transformers.modeling_utils")
    folder = empty(tmp_path / "hf")
    for name in IN_ORDER:
        add(folder, name, checkpoints.tensors())
    for name in IN_ORDER:
        try:
            files, _ = modeling._get_resolved_checkpoint_files(folder, None, None, None, {}, False)
        except (AttributeError, TypeError):
            pytest.skip("a private function of transformers 5.24, which this version lacks")
        found = {file for t in open_checkpoint(folder).tensors.values() for file in t.files}
        assert found == {Path(file).name for file in files}
        (folder / name).unlink()


@pytest.mark.parametrize("how", ["dtype", "layers", "shape"])
def test_difference_of_headers_is_named(tmp_path: Path, how: str) -> None:
    folder = checkpoints.write(tmp_path / "hf", shards=1)
    weights = checkpoints.tensors()
    if how == "dtype":
        weights = {name: weight.float() for name, weight in weights.items()}
    elif how == "layers":
        weights = {name: weight for name, weight in weights.items() if ".11." not in name}
    else:
        weights["lm_head.weight"] = torch.ones(81, 64, dtype=torch.bfloat16)
    add(folder, "pytorch_model.bin", weights)
    (said,) = open_checkpoint(folder).problems
    expected = {"dtype": "float32", "layers": "9 tensors are in one of them only", "shape": "81"}
    assert expected[how] in said.message


def test_equal_sets_are_listed_without_a_warning(tmp_path: Path) -> None:
    folder = checkpoints.write(tmp_path / "hf")
    add(folder, "pytorch_model.bin.index.json", checkpoints.tensors())
    checkpoint = open_checkpoint(folder)
    assert not checkpoint.problems
    (ignored,) = checkpoint.ignored
    assert ignored.name == "pytorch_model.bin.index.json"
    assert f"{INDEX} is used" in ignored.reason


def test_difference_of_one_matrix_is_found(tmp_path: Path) -> None:
    """A merged LoRA changes no norm."""
    folder = checkpoints.write(tmp_path / "hf", doubled("q_proj"))
    add(folder, "pytorch_model.bin", checkpoints.tensors())
    assert "12 of 111 tensors differ in their values" in str(open_checkpoint(folder).problems)


def test_stale_index_is_ignored_and_listed(tmp_path: Path) -> None:
    folder = checkpoints.write(tmp_path / "hf")
    for shard in folder.glob("model-*"):
        shard.unlink()
    add(folder, "model.safetensors", checkpoints.tensors())
    checkpoint = open_checkpoint(folder)
    assert not checkpoint.problems
    assert [one.name for one in checkpoint.ignored] == [INDEX]
    assert "not a complete model" in checkpoint.ignored[0].reason


def relist(folder: Path, edit: Callable[[dict[str, str]], object]) -> Path:
    """Changes what the index says is in which file."""
    checkpoints.edit_json(folder / INDEX, lambda index: edit(index["weight_map"]))
    return folder


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.rotary_emb.inv_freq", "score.weight", "lm_head.weight"]
)
def test_lost_shard_of_what_the_model_does_not_need_is_a_warning(tmp_path: Path, name: str) -> None:
    weights = checkpoints.tensors()
    del weights["lm_head.weight"]
    folder = checkpoints.write(tmp_path / "hf", weights, tie_word_embeddings=True)
    relist(folder, lambda weight_map: weight_map.update({name: "model-00009.safetensors"}))
    plan = make_plan(open_checkpoint(folder))
    assert not plan.errors
    (said,) = plan.problems
    assert "model-00009.safetensors" in said.message
    assert name in said.message


@pytest.mark.parametrize("name", ["model.layers.2.mlp.up_proj.weight", "lm_head.weight"])
def test_lost_shard_of_what_the_model_needs_is_one_error(tmp_path: Path, name: str) -> None:
    folder = checkpoints.write(tmp_path / "hf")
    relist(folder, lambda weight_map: weight_map.update({name: "model-00009.safetensors"}))
    (said,) = make_plan(open_checkpoint(folder)).errors
    assert "model-00009.safetensors" in said.message


def test_index_of_shards_that_were_replaced_is_one_error(tmp_path: Path) -> None:
    folder = checkpoints.write(tmp_path / "hf")
    shards = sorted(folder.glob("model-*"))
    for number, shard in enumerate(shards):
        shard.rename(folder / f"new-{number}.safetensors")
    (said,) = make_plan(open_checkpoint(folder)).problems
    assert said.message.startswith(f"{folder / INDEX}: stale")
    assert f"{len(shards)} files" in said.message
    assert f"move {INDEX} away" in said.message


def test_index_that_cannot_be_read_is_one_error_with_the_way_out(tmp_path: Path) -> None:
    folder = checkpoints.write(tmp_path / "hf")
    (folder / INDEX).write_text("{")
    (said,) = make_plan(open_checkpoint(folder)).problems
    assert said.level == "error"
    assert said.message.startswith(f"{folder / INDEX}: not valid JSON")
    assert said.message.endswith(f"is complete. To convert that, move {INDEX} away")


def test_incomplete_first_set_names_the_complete_one(tmp_path: Path) -> None:
    folder = checkpoints.write(tmp_path / "hf")
    save_file({"model.norm.weight": torch.ones(64)}, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    assert len(checkpoint.tensors) == 1
    (said,) = checkpoint.problems
    assert f"To convert that, give {folder / INDEX}" in said.message


def test_weights_that_config_json_names_come_first(tmp_path: Path) -> None:
    folder = checkpoints.write(tmp_path / "hf", shards=1, transformers_weights="ema.safetensors")
    add(folder, "ema.safetensors", doubled())
    checkpoint = open_checkpoint(folder)
    assert is_doubled(checkpoint)
    assert "ema.safetensors and model.safetensors" in str(checkpoint.problems)


@pytest.mark.parametrize("place", ["", "original"])
@pytest.mark.parametrize("same", [True, False])
def test_files_of_meta_next_to_safetensors_are_compared(
    tmp_path: Path, place: str, same: bool
) -> None:
    """Repositories of Llama hold Meta's files in original/."""
    folder = checkpoints.write(tmp_path / "hf", checkpoints.tensors() if same else doubled())
    metas = tmp_path / "meta"
    convert_checkpoint(
        make_plan(open_checkpoint(checkpoints.write(tmp_path / "other")), Target(to="meta")),
        metas,
        verified=False,
    )
    (folder / place).mkdir(exist_ok=True)
    for name in ("consolidated.00.pth", "params.json"):
        (metas / name).rename(folder / place / name)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.format == "huggingface"
    assert bool(checkpoint.problems) == (not same), checkpoint.problems
    assert "consolidated" in str([*checkpoint.ignored, *checkpoint.problems])


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_pointers_for_every_shard_are_one_error(tmp_path: Path, kind: str) -> None:
    """A clone without git-lfs has a pointer for each file."""
    folder = empty(tmp_path / "hf")
    index = INDEX if kind == "safetensors" else "pytorch_model.bin.index.json"
    add(folder, index, checkpoints.tensors())
    for shard in folder.glob(f"*-of-*.{kind}"):
        shard.write_text(POINTER)
    (error,) = make_plan(open_checkpoint(folder)).errors
    assert "2 files" in error.message
    assert "git lfs pull" in error.message


@pytest.mark.parametrize("content", [POINTER, "<!DOCTYPE html><html></html>", ""])
@pytest.mark.parametrize("file", [INDEX, "model-00002-of-00003.safetensors"])
def test_one_file_that_is_something_else_is_one_error(
    tmp_path: Path, file: str, content: str
) -> None:
    folder = checkpoints.write(tmp_path / "hf")
    (folder / file).write_text(content)
    (error,) = make_plan(open_checkpoint(folder)).errors
    assert str(folder / file) in error.message
    assert "incomplete" not in error.message


def test_missing_shards_are_one_error_with_their_number(tmp_path: Path) -> None:
    folder = checkpoints.write(tmp_path / "hf")
    for number in (1, 2):
        (folder / f"model-0000{number}-of-00003.safetensors").unlink()
    (error,) = make_plan(open_checkpoint(folder)).errors
    assert "2 files" in error.message
    assert "74 tensors" in error.message


def test_missing_shards_without_an_index_are_one_error(tmp_path: Path) -> None:
    folder = checkpoints.write(tmp_path / "hf")
    (folder / INDEX).unlink()
    for number in (1, 2):
        (folder / f"model-0000{number}-of-00003.safetensors").unlink()
    (error,) = make_plan(open_checkpoint(folder)).errors
    assert "shards 1, 2 of 3" in error.message


@pytest.mark.parametrize(
    "names",
    [
        ("model.pt",),
        ("hf_model_0001_0.pt", "hf_model_0002_0.pt"),
        ("checkpoint.pth", "optimizer.pt", "training_args.bin"),
        ("adapter_0.pt", "weights.bin"),
    ],
)
def test_torch_files_by_other_names_are_read_by_their_contents(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    folder = empty(tmp_path / "hf")
    weights = checkpoints.tensors()
    of_model = [n for n in names if "model" in n or n in ("checkpoint.pth", "weights.bin")]
    for name in names:
        if name in of_model:
            part = dict(list(weights.items())[of_model.index(name) :: len(of_model)])
            torch.save({"model": part, "step": 3}, folder / name)
        else:
            torch.save({"state": {0: torch.ones(3)}}, folder / name)
    checkpoint = open_checkpoint(folder)
    assert not make_plan(checkpoint).errors
    assert {file for one in checkpoint.tensors.values() for file in one.files} == set(of_model)
    assert any(of_model[0] in str(one) for one in checkpoint.problems)
    if len(of_model) == 1:
        assert open_checkpoint(folder / of_model[0]).tensors == checkpoint.tensors


def test_torch_files_of_several_steps_are_refused(tmp_path: Path) -> None:
    folder = empty(tmp_path / "hf")
    for step in (1, 2):
        torch.save(checkpoints.tensors(), folder / f"model_{step}.pt")
    (error,) = make_plan(open_checkpoint(folder)).errors
    assert "model_1.pt and in model_2.pt" in error.message
    assert not make_plan(open_checkpoint(folder / "model_2.pt")).errors


def test_torch_file_of_another_model_is_not_a_checkpoint(tmp_path: Path) -> None:
    folder = empty(tmp_path / "hf")
    torch.save({"blocks.0.attn.weight": torch.ones(2, 2)}, folder / "other.pt")
    with pytest.raises(RefusedError, match=r"consolidated\.\*\.pth"):
        open_checkpoint(folder)


class TestMetasNames:
    """Safetensors with Meta's names: rows are interleaved, params.json or config.json describes them."""

    def write(self, tmp_path: Path, name: str, params: str) -> Path:
        source = checkpoints.write(tmp_path / "source")
        made = convert_checkpoint(
            make_plan(open_checkpoint(source), Target(to="meta")), tmp_path / "m", verified=False
        )
        folder = tmp_path / "metas"
        folder.mkdir()
        weights = torch.load(made.target / "consolidated.00.pth")
        add(folder, name, {name: weight.contiguous() for name, weight in weights.items()})
        where = source if params == "config.json" else made.target
        (folder / params).write_text((where / params).read_text())
        return folder

    @pytest.mark.parametrize("params", ["params.json", "config.json"])
    @pytest.mark.parametrize("name", ["consolidated.safetensors", INDEX])
    def test_conversion_to_hugging_face_restores_the_source(
        self, tmp_path: Path, name: str, params: str
    ) -> None:
        folder = self.write(tmp_path, name, params)
        checkpoint = open_checkpoint(folder)
        assert checkpoint.rope == "interleaved"
        assert any("interleaved" in str(one) for one in checkpoint.problems)
        plan = make_plan(checkpoint, Target(to="hf", assets=str(tmp_path / "source")))
        done = convert_checkpoint(plan, tmp_path / "hf")
        assert done.verification
        assert done.verification.ok
        found = load_file(done.target / "model.safetensors")
        expected = checkpoints.tensors()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)

    def test_heads_wider_than_dim_come_from_head_dim(self, tmp_path: Path) -> None:
        folder = self.write(tmp_path, "consolidated.safetensors", "params.json")
        checkpoints.edit_json(folder / "params.json", lambda entries: entries.update(head_dim=16))
        params = open_checkpoint(folder).params
        assert params
        assert params.head_dim == 16

    def test_params_json_of_a_mixture_of_experts_is_refused(self, tmp_path: Path) -> None:
        folder = self.write(tmp_path, "consolidated.safetensors", "params.json")
        checkpoints.edit_json(folder / "params.json", lambda one: one.update(moe={"top_k": 2}))
        assert "moe" in str(open_checkpoint(folder).errors[0])

    def test_missing_params_json_is_one_error(self, tmp_path: Path) -> None:
        folder = self.write(tmp_path, "consolidated.safetensors", "params.json")
        (folder / "params.json").unlink()
        (error,) = make_plan(open_checkpoint(folder)).errors
        assert "params.json: not found" in error.message


def test_index_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    read_json = LocalFolder.read_json

    def noted(self: LocalFolder, name: str) -> dict[str, Any]:
        read.append(name)
        return read_json(self, name)

    monkeypatch.setattr(LocalFolder, "read_json", noted)
    assert not open_checkpoint(add(empty(tmp_path), INDEX, checkpoints.tensors())).errors
    assert read.count(INDEX) == 1
