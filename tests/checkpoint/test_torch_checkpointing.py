"""Folders of torch_checkpointing: small ones that the package wrote, as they are and bent.

The package is not installed here; tests/interop has it write and load larger ones.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import checkpoints, stores
from support.folders import load_dcp, to_version_1
from support.stores import bend, tensor_in

from llamaconv import (
    FailedError,
    RefusedError,
    Target,
    convert_checkpoint,
    make_plan,
    open_checkpoint,
    verify_checkpoint,
)
from llamaconv.checkpoint.untrusted.torch_checkpointing_metadata import Sharding
from llamaconv.cli import main
from llamaconv.verify.compare import compare_checkpoints
from llamaconv.verify.independent_readers import PlainReader, RankFilesReader, reader_for

NAMINGS = {
    "one": "titan-0.3",
    "one-st": "titan-main",
    "fsdp": "titan-0.3",
    "main-2d-st": "titan-main",
}


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stores.unpack(tmp_path_factory.mktemp("stores"))


@pytest.fixture
def home(archive: Path, tmp_path: Path) -> Path:
    """A copy to bend."""
    return shutil.copytree(archive, tmp_path / "home")


@pytest.mark.parametrize("kind", NAMINGS)
@pytest.mark.parametrize("version", ["2.0", "1.0"])
def test_every_value_is_what_the_package_was_given(
    home: Path, tmp_path: Path, kind: str, version: str
) -> None:
    if version == "1.0":
        to_version_1(home / kind)
    naming = NAMINGS[kind]
    checkpoint = open_checkpoint(home / kind)
    assert (checkpoint.format, checkpoint.generation) == ("torch_checkpointing", naming)
    assert not checkpoint.problems
    target = Target(to="dcp", generation=naming, assets=str(home / "source"))
    done = convert_checkpoint(make_plan(checkpoint, target), tmp_path / "dcp")
    assert done.verification is not None
    assert done.verification.ok
    given = torch.load(home / "weights.pt", weights_only=True)[naming]
    written = load_dcp(done.target)
    assert written.keys() == given.keys()
    assert all(torch.equal(written[name], given[name]) for name in given)


def test_it_is_named_and_the_trainers_state_is_said(
    archive: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(archive / "fsdp")]) == 0
    said = capsys.readouterr().out
    assert "torch_checkpointing (titan-0.3)" in said
    for state in ("optimizer", "train_state", "lr_scheduler"):
        assert f"ignored: {state}: " in said


def test_it_becomes_a_hugging_face_folder(archive: Path, tmp_path: Path) -> None:
    plan = make_plan(
        open_checkpoint(archive / "main-2d-st"), Target(assets=str(archive / "source"))
    )
    done = convert_checkpoint(plan, tmp_path / "hf")
    assert done.receipt.source.format == "torch_checkpointing"
    assert verify_checkpoint(tmp_path / "hf", source=archive / "main-2d-st").ok
    assert compare_checkpoints(tmp_path / "hf", archive / "source").equal
    assert open_checkpoint(tmp_path / "hf").format == "huggingface"


def test_it_is_no_target(archive: Path) -> None:
    with pytest.raises(RefusedError, match="read, not written"):
        verify_checkpoint(archive / "fsdp", source=archive / "source")


def test_compare_finds_the_one_value_that_differs(home: Path) -> None:
    assets = str(home / "source")
    assert compare_checkpoints(home / "fsdp", home / "one-st", assets=assets).equal
    piece = open_checkpoint(home / "fsdp").tensors["norm.weight"].pieces[-1]
    with open(piece.local_file, "r+b") as file:
        file.seek(piece.offset)
        file.write(b"\x00\x00")
    compared = compare_checkpoints(home / "fsdp", home / "one-st", assets=assets)
    assert len(compared.different) == 1


def test_the_checks_read_with_other_peoples_readers(archive: Path) -> None:
    assert isinstance(reader_for(open_checkpoint(archive / "fsdp")), RankFilesReader)


def test_the_checks_find_parts_that_the_engine_put_in_the_wrong_order(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks the other way round: every shape fits, and every tensor is filled."""
    rightly = Sharding._held

    def reversed_(self: Sharding, place: tuple[int, ...]) -> Any:
        return rightly(self, [n - 1 - at for n, at in zip(self.mesh, place, strict=True)])

    monkeypatch.setattr(Sharding, "_held", reversed_)
    checkpoint = open_checkpoint(archive / "main-2d-st")
    assert not checkpoint.problems
    plan = make_plan(checkpoint, Target(to="hf", assets=str(archive / "source")))
    with pytest.raises(FailedError, match="bits"):
        convert_checkpoint(plan, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_names_with_wrappers_and_a_deeper_path_are_read(home: Path) -> None:
    """An item that is a dict in a dict, saved of a compiled model."""

    def deeper(metadata: dict[str, Any]) -> None:
        item = metadata["metadata"]["model"]
        item["nested_path_to_metadata"] = {
            json.dumps(["app", f"_orig_mod.{json.loads(text)[0]}"]): groups
            for text, groups in item["nested_path_to_metadata"].items()
        }

    bend(home / "one", deeper)
    weights = torch.load(home / "weights.pt", weights_only=True)["titan-0.3"]
    torch.save(
        {"app": {f"_orig_mod.{name}": one for name, one in weights.items()}},
        home / "one" / "model_0.pt",
    )
    checkpoint = open_checkpoint(home / "one")
    assert checkpoint.generation == "titan-0.3"
    assert not checkpoint.errors
    assert "app._orig_mod.norm.weight" in checkpoint.tensors
    assert compare_checkpoints(home / "one", home / "source").equal


def test_parts_that_are_listed_one_by_one_are_read(home: Path, tmp_path: Path) -> None:
    """What the package calls default_tensor_v1: a tensor that lists its rectangles itself."""
    given = torch.load(home / "weights.pt", weights_only=True)["titan-0.3"]
    name = "layers.0.feed_forward.w1.weight"
    shape = list(given[name].shape)
    half = shape[1] // 2

    def listed(metadata: dict[str, Any]) -> None:
        packed = tensor_in(metadata, name)
        packed["type"] = "default_tensor_v1"
        packed["data"] = {
            "global_shape": shape,
            "global_offsets": [[0, half], [0, 0]],
            "local_offsets": [[0, 0], [0, half]],
            "local_sizes": [[shape[0], half], [shape[0], shape[1] - half]],
            "dtype": "torch.bfloat16",
        }

    bend(home / "one", listed)
    # The rank keeps the right half in front of the left one.
    local = torch.cat([given[name][:, half:], given[name][:, :half]], 1)
    torch.save(given | {name: local}, home / "one" / "model_0.pt")
    checkpoint = open_checkpoint(home / "one")
    assert not checkpoint.problems
    assert isinstance(reader_for(checkpoint), PlainReader)
    assert compare_checkpoints(home / "one", home / "source").equal


def test_a_later_step_uses_the_parameters_of_our_step_0(home: Path, tmp_path: Path) -> None:
    plan = make_plan(open_checkpoint(home / "source"), Target(generation="titan-0.3"))
    convert_checkpoint(plan, tmp_path / "run", as_step_0=True, verified=False)
    step = shutil.copytree(home / "fsdp", tmp_path / "run/checkpoint/step-20")
    checkpoint = open_checkpoint(step)
    assert checkpoint.params == open_checkpoint(home / "source").params
    assert make_plan(checkpoint, Target(to="hf")).errors == []


def test_a_file_of_that_name_next_to_a_model_is_not_ours(tmp_path: Path) -> None:
    folder = checkpoints.write(tmp_path / "hf")
    (folder / "metadata.pkl").write_bytes(pickle.dumps({"anything": 1}))
    assert open_checkpoint(folder).format == "huggingface"


@pytest.mark.parametrize("kind", ["fsdp", "main-2d-st"])
def test_files_of_ranks_without_the_metadata_are_named(home: Path, kind: str) -> None:
    (home / kind / "metadata.pkl").unlink()
    with pytest.raises(RefusedError, match=r"but no metadata\.pkl \(model_0\.") as caught:
        open_checkpoint(home / kind)
    assert len(caught.value.problems) == 1


# Bad input: one error each, which says the file or the tensor and the cause.


def removed(folder: Path) -> None:
    (folder / "model_2.pt").unlink()


def cut_short(folder: Path) -> None:
    os.truncate(folder / "model_2.pt", 5000)


def of_another_save(folder: Path) -> None:
    shutil.copy(folder.parent / "one" / "model_0.pt", folder / "model_1.pt")


def too_long(folder: Path) -> None:
    bend(folder, lambda m: tensor_in(m, "norm.weight")["data"].update(global_shape=[32]))


def other_dtype(folder: Path) -> None:
    bend(folder, lambda m: tensor_in(m, "norm.weight")["data"].update(dtype="torch.float32"))


def without_a_rank(folder: Path) -> None:
    def change(metadata: dict[str, Any]) -> None:
        paths = metadata["metadata"]["model"]["nested_path_to_metadata"]
        paths['["norm.weight"]'][0]["ranks"] = (0, 1, 3)

    bend(folder, change)


def overlapping(folder: Path) -> None:
    def change(metadata: dict[str, Any]) -> None:
        packed = tensor_in(metadata, "norm.weight")
        packed["type"] = "default_tensor_v1"
        packed["data"] |= {
            "global_offsets": [[0], [2]],
            "local_offsets": [[0], [0]],
            "local_sizes": [[4], [4]],
        }
        packed["data"]["global_shape"] = [8]

    bend(folder, change)


def partial_sums(folder: Path) -> None:
    def change(metadata: dict[str, Any]) -> None:
        tensor_in(metadata, "norm.weight")["data"]["placements"] = [{"type": "Partial"}]

    bend(folder, change)


def not_described(folder: Path) -> None:
    bend(folder, lambda m: m["metadata"].pop("model") and None)


def not_a_tensor(folder: Path) -> None:
    value = {"norm.weight": 5}
    torch.save(value, folder / "model_0.pt")


def hostile_file(folder: Path) -> None:
    torch.save({"norm.weight": Hostile()}, folder / "model_0.pt")


class Hostile:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/llamaconv-was-here",)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (removed, ["model_2.pt: not found", "rank 2", "12 tensors", "incomplete"]),
        (cut_short, ["model_2.pt: cut or damaged"]),
        (of_another_save, ["part of rank 1, in model_1.pt", "of different saves"]),
        (too_long, ["norm.weight", "rank 0", "[4]", "[8] of [32]"]),
        (other_dtype, ["norm.weight", "bfloat16, and float32 by metadata.pkl"]),
        (without_a_rank, ["norm.weight", "12 elements instead of 16"]),
        (overlapping, ["norm.weight", "two of its pieces overlap"]),
        (partial_sums, ["norm.weight", "placed by 'Partial'", "later than 0.1.1"]),
        (not_described, ["no tensor of a model is described", "resharder"]),
        (hostile_file, ["model_0.pt: it asks for posix.system", "not opened further"]),
    ],
)
def test_damage_is_one_clear_error_and_nothing_is_written(
    home: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    words: list[str],
) -> None:
    damage(home / "fsdp")
    command = ["convert", str(home / "fsdp"), str(tmp_path / "hf"), "--to", "hf"]
    assert main([*command, "--assets", str(home / "source")]) == 2
    errors = [one for one in capsys.readouterr().err.splitlines() if one.startswith("error:")]
    about = [one for one in errors if words[0] in one]
    assert about, errors
    for word in words:
        assert word in about[0]
    # Another save differs in each tensor; everything else has one cause.
    assert len(errors) == (1 if damage is not of_another_save else len(errors))
    assert not (tmp_path / "hf").exists()
    assert not Path("/tmp/llamaconv-was-here").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update(version="3.0"), "version is '3.0'; 1.0 and 2.0 are known"),
        (lambda m: m.update(version=2.0), "version is 2.0"),
        (lambda m: m.update(world_size=3), "saved by 3 ranks"),
        (lambda m: m.update(world_size=0), "world_size is 0"),
        (lambda m: m.update(world_size=10**15), "world_size is 10"),
        (lambda m: [1, 2], "it is not a dict"),
        (lambda m: {"anything": 1}, "another program wrote it"),
        (lambda m: m["metadata"].update({"../x": m["metadata"]["model"]}), "name of an item"),
        (lambda m: tensor_in(m, "norm.weight")["data"].update(global_shape=[-4]), "its shape"),
        (lambda m: tensor_in(m, "norm.weight")["data"].update(global_shape="ab"), "its shape"),
        (
            lambda m: tensor_in(m, "norm.weight")["data"].update(
                placements=[{"type": "Shard", "dim": 1}]
            ),
            "cut along axis 1 of 1",
        ),
        (
            lambda m: tensor_in(m, "norm.weight")["data"]["mesh_spec"].update(mesh_shape=(2,)),
            "its mesh of shape [2]",
        ),
        (
            lambda m: tensor_in(m, "norm.weight")["data"].update(placements=[]),
            "one placement for each dimension",
        ),
    ],
)
def test_metadata_that_cannot_be_right_is_refused(
    home: Path, change: Callable[[dict[str, Any]], Any], words: str
) -> None:
    bend(home / "fsdp", change)
    with pytest.raises(RefusedError) as caught:
        open_checkpoint(home / "fsdp")
    (problem,) = caught.value.problems
    assert problem.message.startswith(f"{home / 'fsdp' / 'metadata.pkl'}: ")
    assert words in problem.message


@pytest.mark.parametrize("path", ["../model_0.pt", "/etc/passwd", "a/../../b", "", "a\0b"])
def test_a_file_outside_the_checkpoint_is_refused(home: Path, path: str) -> None:
    def outside(metadata: dict[str, Any]) -> None:
        layout = {"file_path": path, "serialization_format": {"type": "TorchSerialization"}}
        metadata["metadata"]["model"]["rank_to_layout_info"][0] = layout

    bend(home / "fsdp", outside)
    with pytest.raises(RefusedError, match="outside the checkpoint"):
        open_checkpoint(home / "fsdp")


def test_a_file_in_a_folder_of_the_checkpoint_is_read(home: Path) -> None:
    def inside(metadata: dict[str, Any]) -> None:
        layout = {
            "file_path": "rank_0/m.pt",
            "serialization_format": {"type": "TorchSerialization"},
        }
        metadata["metadata"]["model"]["rank_to_layout_info"][0] = layout

    bend(home / "fsdp", inside)
    (home / "fsdp/rank_0").mkdir()
    (home / "fsdp/model_0.pt").rename(home / "fsdp/rank_0/m.pt")
    assert not open_checkpoint(home / "fsdp").problems


def test_two_items_in_one_file_are_refused(home: Path) -> None:
    def shared(metadata: dict[str, Any]) -> None:
        layout = {"file_path": "model_0.pt", "serialization_format": {"type": "TorchSerialization"}}
        metadata["metadata"]["optimizer"]["rank_to_layout_info"][0] = layout

    bend(home / "fsdp", shared)
    with pytest.raises(RefusedError, match=r"model_0\.pt is the file of"):
        open_checkpoint(home / "fsdp")


def test_a_hostile_pickle_is_not_opened(home: Path) -> None:
    (home / "fsdp/metadata.pkl").write_bytes(pickle.dumps({"metadata": Hostile()}))
    with pytest.raises(RefusedError, match=r"asks for posix\.system"):
        open_checkpoint(home / "fsdp")
    assert not Path("/tmp/llamaconv-was-here").exists()


@pytest.mark.parametrize("content", [b"", b"\x80", b"not a pickle", pickle.dumps(7)])
def test_what_is_no_metadata_is_refused(home: Path, content: bytes) -> None:
    (home / "fsdp/metadata.pkl").write_bytes(content)
    with pytest.raises(RefusedError, match=r"metadata\.pkl: "):
        open_checkpoint(home / "fsdp")


@pytest.mark.parametrize("kind", ["fsdp", "main-2d-st"])
def test_any_other_value_in_the_metadata_is_read_or_refused(home: Path, kind: str) -> None:
    original = pickle.loads((home / kind / "metadata.pkl").read_bytes())
    n_refused = 0
    for seed in range(120):
        rng = random.Random(seed)
        content = stores.mangled(original, rng)
        (home / kind / "metadata.pkl").write_bytes(pickle.dumps(content))
        try:
            checkpoint = open_checkpoint(home / kind)
        except RefusedError:
            n_refused += 1
            continue
        plan = make_plan(checkpoint, Target(to="hf", assets=str(home / "source")))
        assert plan.params or plan.errors
        n_refused += bool(plan.errors)
    assert n_refused > 60


def test_shared_values_do_not_multiply(home: Path) -> None:
    """A pickle of a few kilobytes, in which a thousand tensors share one list of a million ranks."""

    def shared(metadata: dict[str, Any]) -> None:
        item = metadata["metadata"]["model"]["nested_path_to_metadata"]
        (group,) = item['["norm.weight"]']
        group["ranks"] = ranks = list(range(1 << 16))
        tensor_in(metadata, "norm.weight")["data"]["mesh_spec"]["mesh_data"] = ranks
        item |= {f'["a{number}"]': [group] for number in range(2000)}

    bend(home / "fsdp", shared)
    with pytest.raises(RefusedError, match="parts"):
        open_checkpoint(home / "fsdp")


def test_the_optimizer_is_not_carried_and_that_is_said(archive: Path) -> None:
    options = Target(to="dcp", with_optimizer=True, assets=str(archive / "source"))
    (error,) = make_plan(open_checkpoint(archive / "fsdp"), options).errors
    assert "trainer's state of torch_checkpointing is not carried" in error.message
