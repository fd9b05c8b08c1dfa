"""titan-main is written as TorchTitan's main branch stores it, in chunks of any number."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support import checkpoints
from support.folders import assert_same_folder, of_main
from torch import Tensor

from llamaconv import (
    RefusedError,
    Target,
    convert_checkpoint,
    make_plan,
    open_checkpoint,
    verify_checkpoint,
)
from llamaconv.checkpoint.tensors import TensorInfo
from llamaconv.convert.convert import Conversion
from llamaconv.convert.every_step import plan_every_step
from llamaconv.convert.joined import Joined, JoinedBlocks

WQKV, W13 = "layers.0.attention.qkv_linear.wqkv.weight", "layers.0.feed_forward.w13.weight"

Load = Callable[[Path], dict[str, Tensor]]


# 5: chunks of wqkv begin within a head of 8 rows, and the last of w13 is shorter.
@pytest.mark.parametrize("shards", [1, 5])
def test_titan_main_is_what_torch_fuses(
    source: Path, convert: Callable[..., Conversion], load_dcp: Load, shards: int
) -> None:
    split = load_dcp(convert(source, "split", verified=False).target)
    expected = of_main(split, checkpoints.GQA)
    done = convert(source, "main", generation="titan-main", shards=shards)
    assert done.verification is not None and done.verification.ok
    found = load_dcp(done.target)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    opened = open_checkpoint(done.target)
    assert opened.generation == "titan-main" and not opened.problems
    assert {piece.shape[0] for piece in opened.tensors[W13].pieces} == {2}
    assert len(opened.tensors[W13].pieces) == len(opened.tensors[WQKV].pieces) == shards
    assert verify_checkpoint(done.target).ok
    back = convert_checkpoint(make_plan(opened), done.target.with_name("back"))
    assert_same_folder(source, back.target)


@pytest.mark.thorough
def test_titan_main_goes_to_every_other_form_and_back(
    source: Path, convert: Callable[..., Conversion], load_dcp: Load
) -> None:
    main = convert(source, "main", generation="titan-main", shards=3, verified=False).target
    expected = load_dcp(main)
    forms = (
        {"to": "dcp", "generation": "titan-0.2", "shards": 2},
        {"to": "dcp", "generation": "titan-main", "shards": 7},
        {"to": "meta", "shards": 2},
    )
    for number, options in enumerate(forms):
        other = convert(main, f"other-{number}", **options)
        assert other.verification is not None and other.verification.ok
        options = {"to": "dcp", "generation": "titan-main", "shards": 2}
        again = convert(other.target, f"again-{number}", **options)
        found = load_dcp(again.target)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)


def test_a_cast_and_the_other_layout_reach_the_fused_rows(
    source: Path, convert: Callable[..., Conversion], load_dcp: Load
) -> None:
    options = {"rope": "half_split", "dtype": "float32", "verified": False}
    split = load_dcp(convert(source, "split", **options).target)
    found = load_dcp(convert(source, "main", generation="titan-main", **options).target)
    assert torch.equal(found[WQKV], of_main(split, checkpoints.GQA)[WQKV])


def test_a_damaged_fused_tensor_fails_the_checks(
    source: Path, convert: Callable[..., Conversion]
) -> None:
    done = convert(source, "main", generation="titan-main", verified=False)
    piece = open_checkpoint(done.target).tensors[W13].pieces[0]
    with piece.local_file.open("r+b") as file:
        file.seek(piece.offset + 2 * 96 * 64)  # w1 has 96 rows of 64 elements of 2 bytes
        file.write(b"\x12\x34")
    against_receipt = verify_checkpoint(done.target)
    assert not against_receipt.ok and W13 in str(against_receipt.checks[-1].detail)
    failed = next(one for one in verify_checkpoint(done.target, source=source).checks if not one.ok)
    assert failed.name == "bits" and f"{W13}[w3]" in failed.detail


def test_the_checks_of_large_tensors_take_them_apart_themselves(
    source: Path, convert: Callable[..., Conversion], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llamaconv.verify.independent_readers.WHOLE_BYTES", 200)
    done = convert(source, "main", generation="titan-main", shards=5)
    assert done.verification is not None and done.verification.ok
    # The rows of the first key head, each in the place of the one before it.
    pieces = open_checkpoint(done.target).tensors[WQKV].pieces
    piece = next(one for one in pieces if one.start[0] == 20)
    with piece.local_file.open("r+b") as file:
        file.seek(piece.offset + 12 * 128)  # row 32: 4 query heads of 8 rows come first
        rows = file.read(8 * 128)
        file.seek(piece.offset + 12 * 128)
        file.write(rows[128:] + rows[:128])
    checks = verify_checkpoint(done.target, source=source).checks
    assert f"in 1 tensors: {WQKV}[wk]" in next(one for one in checks if not one.ok).detail


class _Rows:
    """Blocks of at most two rows of one byte: the row's number, with the tensor's name before it."""

    def blocks(self, name: str, first: int, last: int) -> Iterator[memoryview]:
        for begin in range(first, last, 2):
            rows = range(begin, min(begin + 2, last))
            yield memoryview(b"".join(f"{name}{row}".encode() for row in rows))

    def is_valid(self, name: str) -> bool:
        return name != "k"


def test_a_joined_chunk_can_be_read_from_any_row_on() -> None:
    """A resumed conversion goes on within a chunk."""
    joined = Joined(TensorInfo("x", "uint8", (8, 1)), 0, (("q", 0, 3), ("k", 0, 1), ("q", 3, 7)))
    rows = ["q0", "q1", "q2", "k0", "q3", "q4", "q5", "q6"]
    for begin in range(8):
        for end in range(begin + 1, 9):
            runs = joined.chunk((begin, 0), (end - begin, 1))
            blocks = JoinedBlocks(_Rows(), runs)
            for first in range(end - begin):
                found = b"".join(blocks.blocks("x", first, end - begin)).decode()
                assert found == "".join(rows[begin + first : end])
            assert blocks.is_valid("x") == ("k0" not in rows[begin:end])


def test_roles_of_two_dtypes_cannot_share_a_tensor(tmp_path: Path) -> None:
    weights = checkpoints.tensors()
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] = weights[name].float()
    opened = open_checkpoint(checkpoints.write(tmp_path / "mixed", weights))
    (error,) = make_plan(opened, Target(generation="titan-main")).errors
    assert "different dtypes" in str(error) and "--dtype" in str(error)
    assert not make_plan(opened, Target(generation="titan-main", dtype="bfloat16")).errors
    assert not make_plan(opened, Target(generation="titan-0.3")).errors


def test_a_run_of_two_generations_is_refused(
    source: Path, tmp_path: Path, convert: Callable[..., Conversion]
) -> None:
    convert(source, "run/step-0", verified=False)
    convert(source, "run/step-10", generation="titan-main", verified=False)
    with pytest.raises(RefusedError, match=r"titan-0\.3 in step-0; titan-main in step-10"):
        plan_every_step(tmp_path / "run", tmp_path / "out", Target(to="hf"))
