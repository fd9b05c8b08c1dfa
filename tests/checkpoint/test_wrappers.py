"""Names with the parts of wrappers: read without them, reported, and refused if two are one."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import checkpoints
from support.checkpoints import GQA
from torch import Tensor
from torch.distributed.checkpoint import save

from llamaconv import RefusedError, Target, convert_checkpoint, make_plan, open_checkpoint
from llamaconv.model.names import every_role

Rename = Callable[[str], str]


def titan(weights: Mapping[str, Tensor], naming: str) -> dict[str, Tensor]:
    """The same model under the names of another column, rows as they are."""
    return {
        str(role.in_naming(naming, layer)): weights[str(role.in_naming("huggingface", layer))]
        for role, layer in every_role(GQA)
    }


def mapped(checkpoint: Path, source: Path, to: str = "hf") -> dict[str, str]:
    """The stored name of each tensor of the target, by its name there."""
    plan = make_plan(open_checkpoint(checkpoint), Target(to=to, assets=str(source)))
    plan.raise_for_errors()
    return {move.target_name: move.source for move in plan.written}


def compiled(name: str) -> str:
    return f"_orig_mod.{name}"


def checkpointed(name: str) -> str:
    parts = name.split(".")
    at = parts.index("layers") if "layers" in parts else None
    return (
        name
        if at is None
        else ".".join([*parts[: at + 2], "_checkpoint_wrapped_module", *parts[at + 2 :]])
    )


def fsdp_of_compiled(name: str) -> str:
    return f"_fsdp_wrapped_module.{compiled(checkpointed(name))}"


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"model.{name}",
        lambda name: f"app.model.{name}",
        lambda name: f"state_dict._forward_module.{name}",
        compiled,
        checkpointed,
        fsdp_of_compiled,
    ],
)
def test_wrapped_dcp_converts_and_the_wrapper_is_reported(tmp_path: Path, rename: Rename) -> None:
    weights = checkpoints.tensors()
    source = checkpoints.write(tmp_path / "source", weights)
    stored = {rename(name): weight for name, weight in weights.items()}
    save(stored, checkpoint_id=tmp_path / "dcp", no_dist=True)
    opened = open_checkpoint(tmp_path / "dcp")
    assert opened.naming == "huggingface"
    assert set(opened.tensors) == set(stored), "a reader finds a tensor by its stored name"
    (said,) = opened.problems
    n_wrapped = sum(rename(name) != name for name in weights)
    assert said.level == "warning"
    assert f"{n_wrapped} names" in said.message
    assert mapped(tmp_path / "dcp", source) == {name: rename(name) for name in weights}


def test_wrapped_dcp_is_converted_and_verified_to_the_bit(tmp_path: Path) -> None:
    weights = checkpoints.tensors()
    source = checkpoints.write(tmp_path / "source", weights)
    stored = {fsdp_of_compiled(name): weight for name, weight in weights.items()}
    save({"model": stored}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    plan = make_plan(open_checkpoint(tmp_path / "dcp"), Target(to="hf", assets=str(source)))
    done = convert_checkpoint(plan, tmp_path / "target")
    assert done.verification is not None
    assert done.verification.ok
    written = load_file(tmp_path / "target" / "model.safetensors")
    assert written.keys() == weights.keys()
    assert all(torch.equal(written[name], weights[name]) for name in weights)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_wrapped_huggingface_folder_is_read(tmp_path: Path, suffix: str) -> None:
    weights = checkpoints.tensors()
    folder = checkpoints.write(tmp_path / "wrapped", {}, shards=1)
    (folder / "model.safetensors").unlink()
    stored = {f"module.{checkpointed(name)}": weight for name, weight in weights.items()}
    if suffix == "bin":
        torch.save(stored, folder / "pytorch_model.bin")
    else:
        save_file(stored, folder / "model.safetensors")
    assert any("module" in p.message for p in open_checkpoint(folder).problems)
    assert set(mapped(folder, folder, "dcp").values()) == set(stored)


def test_meta_files_with_wrapped_names_convert(tmp_path: Path) -> None:
    weights = checkpoints.tensors()
    source = checkpoints.write(tmp_path / "source", weights)
    meta = tmp_path / "meta"
    plan = make_plan(open_checkpoint(source), Target(to="meta", shards=2))
    convert_checkpoint(plan, meta, verified=False)
    for file in meta.glob("consolidated.*.pth"):
        parts = torch.load(file, weights_only=True)
        torch.save({f"_orig_mod.{name}": part for name, part in parts.items()}, file)
    assert mapped(meta, source)["model.norm.weight"] == "_orig_mod.norm.weight"


def test_fused_matrix_with_wrapped_name_is_split(tmp_path: Path) -> None:
    weights = checkpoints.tensors()
    source = checkpoints.write(tmp_path / "source", weights)
    stored = titan(weights, "titan-0.3")
    for layer in range(GQA.n_layers):
        q, k, v = (
            stored.pop(f"layers.{layer}.attention.qkv_linear.w{one}.weight") for one in "qkv"
        )
        groups = [one.reshape(GQA.n_kv_heads, -1, GQA.head_dim, GQA.dim) for one in (q, k, v)]
        stored[f"layers.{layer}.attention.qkv_linear.wqkv.weight"] = torch.cat(groups, 1).reshape(
            -1, GQA.dim
        )
    save(
        {f"_orig_mod.{name}": weight for name, weight in stored.items()},
        checkpoint_id=tmp_path / "dcp",
        no_dist=True,
    )
    assert set(mapped(tmp_path / "dcp", source)) == set(weights)


def test_second_model_under_another_key_is_one_problem(tmp_path: Path) -> None:
    weights = checkpoints.tensors()
    source = checkpoints.write(tmp_path / "source", weights)
    save({"policy": weights, "ref": weights}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    plan = make_plan(open_checkpoint(tmp_path / "dcp"), Target(to="hf", assets=str(source)))
    (problem,) = plan.errors
    assert f"{len(weights)} tensors" in problem.message
    assert "second model, under 'ref.'" in problem.message


def test_two_names_that_differ_in_their_wrappers_alone_are_refused(tmp_path: Path) -> None:
    weights = checkpoints.tensors()
    source = checkpoints.write(tmp_path / "source", weights)
    both = {**weights, "policy.lm_head.weight": weights["lm_head.weight"] + 1}
    save(both, checkpoint_id=tmp_path / "dcp", no_dist=True)
    plan = make_plan(open_checkpoint(tmp_path / "dcp"), Target(to="hf", assets=str(source)))
    with pytest.raises(
        RefusedError, match=r"lm_head\.weight and policy\.lm_head\.weight"
    ) as caught:
        plan.raise_for_errors()
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    ("front", "head"),
    [("transformer.", "qa_outputs.weight"), ("pretrained_model.", "v_head.weight")],
)
def test_wrapped_model_with_another_head_is_one_error(
    tmp_path: Path, front: str, head: str
) -> None:
    """As transformers' LlamaForQuestionAnswering and TRL name them."""
    weights = checkpoints.tensors()
    if front == "transformer.":
        del weights["lm_head.weight"]
        weights = {name.removeprefix("model."): one for name, one in weights.items()}
    weights = {front + name: one for name, one in weights.items()} | {head: torch.ones(2, 64)}
    (error,) = make_plan(open_checkpoint(checkpoints.write(tmp_path / "hf", weights))).errors
    assert head in error.message
    assert ("lm_head.weight, which it needs" in error.message) == (front == "transformer.")
