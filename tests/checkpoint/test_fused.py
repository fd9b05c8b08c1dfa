"""DCPs with several roles in one tensor: nightlies with wqkv alone, and titan-main with w13 too."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import checkpoints
from support.folders import assert_same_folder, fused, of_main
from torch import Tensor
from torch.distributed.checkpoint import save

from llamaconv import Target, convert_checkpoint, make_plan, open_checkpoint
from llamaconv.checkpoint.fused import strips
from llamaconv.convert.convert import Conversion
from llamaconv.model.names import FUSED
from llamaconv.plan.planner import with_header_errors

Save = Callable[[dict[str, Tensor]], Path]


@pytest.fixture
def state(
    source: Path, convert: Callable[..., Conversion], load_dcp: Callable[[Path], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """The tensors of titan-0.3, interleaved."""
    return load_dcp(convert(source, "whole", verified=False).target)


@pytest.fixture
def saved(tmp_path: Path) -> Save:
    """Save a state with torch."""

    def write(state: dict[str, Tensor]) -> Path:
        save(state, checkpoint_id=tmp_path / "saved", no_dist=True)
        return tmp_path / "saved"

    return write


@pytest.mark.parametrize(("kind", "generation"), [(fused, "titan-0.3"), (of_main, "titan-main")])
def test_fused_tensors_come_back_equal_to_the_bit(
    state: dict[str, Tensor],
    saved: Save,
    source: Path,
    tmp_path: Path,
    kind: Callable[..., dict[str, Tensor]],
    generation: str,
) -> None:
    checkpoint = open_checkpoint(saved(kind(state, checkpoints.GQA)))
    assert not checkpoint.problems and checkpoint.rope == "interleaved"
    assert checkpoint.generation == generation
    assert not with_header_errors(checkpoint).problems
    done = convert_checkpoint(make_plan(checkpoint, Target(assets=str(source))), tmp_path / "back")
    assert done.verification is not None and done.verification.ok
    assert_same_folder(source, done.target)


def test_w13_beside_separate_q_k_and_v_is_read_too(
    state: dict[str, Tensor], saved: Save, source: Path, tmp_path: Path
) -> None:
    """The nightly of one day, between #4808 and #4815."""
    main = of_main(state, checkpoints.GQA)
    mixed = {name: one for name, one in main.items() if "wqkv" not in name}
    mixed |= {name: one for name, one in state.items() if "qkv_linear" in name}
    checkpoint = open_checkpoint(saved(mixed))
    assert not checkpoint.problems
    plan = make_plan(checkpoint, Target(assets=str(source)))
    assert_same_folder(source, convert_checkpoint(plan, tmp_path / "back").target)


def test_other_heads_are_refused_by_shape(
    state: dict[str, Tensor], saved: Save, tmp_path: Path
) -> None:
    other = checkpoints.write(tmp_path / "other", num_key_value_heads=4)
    opened = open_checkpoint(saved(of_main(state, checkpoints.GQA)))
    errors = [str(error) for error in make_plan(opened, Target(assets=str(other))).errors]
    assert "wqkv.weight: expected shape [128, 64] for 8 heads and 4 kv heads" in errors[0]
    assert not any("missing" in error for error in errors)


def test_a_matrix_as_w13_is_refused_with_its_reason(
    state: dict[str, Tensor], saved: Save, source: Path
) -> None:
    main = of_main(state, checkpoints.GQA)
    name = "layers.3.feed_forward.w13.weight"
    main[name] = main[name].transpose(0, 1).reshape(-1, 64).contiguous()
    plan = make_plan(open_checkpoint(saved(main)), Target(assets=str(source)))
    (error,) = plan.errors
    assert f"{name}: expected shape [2, 96, 64]" in str(error)
    assert "found [192, 64]" in str(error) and "row by row in turn" in str(error)


@pytest.mark.parametrize(
    ("layer", "words"), [("layers.4.", "w13 and w1, w3"), ("layers.0.", "w13 and w1, w3")]
)
def test_a_checkpoint_of_two_generations_is_one_error(
    state: dict[str, Tensor], saved: Save, source: Path, layer: str, words: str
) -> None:
    main = of_main(state, checkpoints.GQA)
    main |= {name: one for name, one in state.items() if f"{layer}feed" in name}
    if layer == "layers.4.":  # in the other layers
        del main[f"{layer}feed_forward.w13.weight"]
    plan = make_plan(open_checkpoint(saved(main)), Target(assets=str(source)))
    (error,) = plan.errors
    assert f"several generations in one checkpoint, {words}" in str(error)


def test_a_missing_fused_tensor_is_named_once(
    state: dict[str, Tensor], saved: Save, source: Path
) -> None:
    main = of_main(state, checkpoints.GQA)
    del main["layers.2.attention.qkv_linear.wqkv.weight"]
    plan = make_plan(open_checkpoint(saved(main)), Target(assets=str(source)))
    assert plan.missing == ("layers.2.attention.qkv_linear.wqkv.weight",)
    assert "1 tensors that a Llama of 12 layers needs are missing" in str(plan.errors[0])


def test_the_strips_of_a_fused_tensor_are_all_rows_of_its_roles() -> None:
    params = checkpoints.GQA
    for fused_role in FUSED.values():
        every = strips(fused_role.name, params)
        assert {role for role, *_ in every} == set(fused_role.parts)
        rows = sum(last - first for _, first, last in every)
        assert rows * params.dim == torch.Size(fused_role.shape(params)).numel()
