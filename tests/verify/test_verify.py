"""Checks that can fail: each is seen to fail for the fault it is there for."""

import errno
import mmap
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import checkpoints
from torch import Tensor
from torch.distributed.checkpoint import save

from llamaconv import RefusedError, sample_path, verify_checkpoint
from llamaconv.convert.convert import Conversion
from llamaconv.model import rope
from llamaconv.notebook import damage, figures
from llamaconv.verify import bits_and_scores, independent_readers
from llamaconv.verify.results import Check, Verification

Bend = Callable[[dict[str, Tensor]], None]
WQ = "layers.5.attention.qkv_linear.wq.weight"
WK = "layers.5.attention.qkv_linear.wk.weight"


@pytest.fixture
def target(source: Path, convert: Callable[..., Conversion]) -> Path:
    return convert(source, verified=False).target


def resaved(target: Path, load_dcp: Callable[[Path], dict[str, Tensor]], bend: Bend) -> Path:
    """The target bent and saved again by torch, so that only the content is at fault."""
    state = load_dcp(target)
    bend(state)
    other = target.with_name("bent")
    save(state, checkpoint_id=other, no_dist=True)
    shutil.copy(target / "llamaconv.json", other)
    return other


def checks(verification: Verification) -> dict[str, bool]:
    return {check.name: check.ok for check in verification.checks}


def test_good_target_passes_and_its_controls_fail(source: Path, target: Path) -> None:
    verification = verify_checkpoint(target, source=source)
    assert verification.ok
    assert checks(verification) == dict.fromkeys(
        ("structure", "bits", "rotated scores", "logits", "loss"), True
    )
    for check in verification.checks:
        assert check.control is not None
        assert check.control > 100 * check.value
    assert len(verification.layers) == 12
    assert min(yardstick for _, yardstick in verification.layers) > 0.1


def test_checkpoint_saved_by_torch_from_the_same_tensors_passes(
    source: Path, target: Path, load_dcp: Callable[[Path], dict[str, Tensor]]
) -> None:
    assert verify_checkpoint(resaved(target, load_dcp, lambda state: None), source=source).ok


def flip_one_bit(state: dict[str, Tensor]) -> None:
    state["layers.11.feed_forward.w2.weight"].view(torch.int16)[63, 95] ^= 1


def swap_norms(state: dict[str, Tensor]) -> None:
    one, other = "layers.3.attention_norm.weight", "layers.3.ffn_norm.weight"
    state[one], state[other] = state[other], state[one]


def swap_gate_and_up(state: dict[str, Tensor]) -> None:
    one, other = "layers.3.feed_forward.w1.weight", "layers.3.feed_forward.w3.weight"
    state[one], state[other] = state[other], state[one]


def one_head_in_the_other_layout(state: dict[str, Tensor]) -> None:
    state[WQ][8:16] = rope.interleaved_to_half_split(state[WQ][8:16], 1)


def k_not_reordered(state: dict[str, Tensor]) -> None:
    state[WK] = rope.interleaved_to_half_split(state[WK], 2)


def reordered_twice(state: dict[str, Tensor]) -> None:
    state[WQ] = rope.half_split_to_interleaved(state[WQ], 8)
    state[WK] = rope.half_split_to_interleaved(state[WK], 2)


@pytest.mark.parametrize(
    ("bend", "failing"),
    [
        (flip_one_bit, {"bits"}),
        (swap_norms, {"bits", "logits"}),
        (swap_gate_and_up, {"bits", "logits"}),
        (one_head_in_the_other_layout, {"bits", "rotated scores"}),
        (k_not_reordered, {"bits", "rotated scores", "logits"}),
        (reordered_twice, {"bits", "rotated scores", "logits"}),
        (lambda state: state.pop(WQ), {"structure"}),
        (lambda state: state.update({WQ: state[WQ].float()}), {"structure"}),
        (lambda state: state.update({WQ: state[WQ][:-1].clone()}), {"structure"}),
        (lambda state: state.update({"extra.weight": torch.ones(2)}), {"structure"}),
    ],
)
def test_each_fault_fails_its_own_check(
    source: Path,
    target: Path,
    load_dcp: Callable[[Path], dict[str, Tensor]],
    bend: Bend,
    failing: set[str],
) -> None:
    verification = verify_checkpoint(resaved(target, load_dcp, bend), source=source)
    assert not verification.ok
    assert failing <= {name for name, ok in checks(verification).items() if not ok}
    said = "\n".join(map(str, verification.problems))
    if failing == {"bits"}:
        assert "1 of" in said
        assert "layers.11.feed_forward.w2.weight" in said


def test_a_half_split_target_read_as_interleaved_fails(
    source: Path, convert: Callable[..., Conversion]
) -> None:
    done = convert(source, rope="half_split")
    assert done.verification is not None
    assert done.verification.ok
    checkpoints.edit_json(
        done.target / "llamaconv.json", lambda entries: entries["target"].update(rope="interleaved")
    )
    assert not verify_checkpoint(done.target, source=source).ok


def test_target_without_a_receipt_is_recognised_by_its_names(source: Path, target: Path) -> None:
    (target / "llamaconv.json").unlink()
    assert verify_checkpoint(target, source=source).ok


def test_windows_and_whole_tensors_give_the_same_result(
    source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for whole, window in ((0, 1), (0, 3000), (1 << 30, 1)):
        monkeypatch.setattr(independent_readers, "WHOLE_BYTES", whole)
        monkeypatch.setattr(bits_and_scores, "WINDOW_BYTES", window)
        verification = verify_checkpoint(target, source=source)
        assert verification.ok
        # Tensors of a DCP that `dcp.load` does not load whole are read by our own reader.
        assert ("llamaconv's own reader" in verification.checks[1].detail) == (whole == 0)


@pytest.mark.parametrize("to", ["dcp", "meta"])
def test_filesystem_that_cannot_map_files_is_read_by_our_reader_and_reported(
    source: Path, convert: Callable[..., Conversion], monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    def cannot(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENODEV, "No such device")

    real = mmap.mmap

    def cannot_file(descriptor: int, *arguments: Any, **options: Any) -> mmap.mmap:
        if descriptor != -1:  # memory that is no file's there is everywhere
            cannot()
        return real(-1, *arguments, **options)

    monkeypatch.setattr("mmap.mmap", cannot_file)
    monkeypatch.setattr(independent_readers, "safe_open", cannot)
    target = convert(source, to=to, verified=False).target
    verification = verify_checkpoint(target, source=source)
    assert verification.ok
    assert "because the filesystem cannot map files" in verification.checks[1].detail
    damage.flip_one_bit(target)
    assert not verify_checkpoint(target, source=source).ok


@pytest.fixture(params=["cut", "gone", "zeroed", "other metadata"])
def damaged(target: Path, request: pytest.FixtureRequest) -> Path:
    file = target / "__0_0.distcp"
    if request.param == "cut":
        with open(file, "r+b") as handle:
            handle.truncate(file.stat().st_size - 1000)
    elif request.param == "gone":
        file.unlink()
    elif request.param == "zeroed":
        with open(file, "r+b") as handle:
            handle.seek(file.stat().st_size // 2)
            handle.write(bytes(4096))
    else:
        (target / ".metadata").write_bytes(b"\x80\x04]\x94.")
    return target


def test_a_damaged_target_fails_with_a_reason_and_no_traceback(source: Path, damaged: Path) -> None:
    if len((damaged / ".metadata").read_bytes()) < 100:
        with pytest.raises(RefusedError, match=r"\.metadata"):
            verify_checkpoint(damaged, source=source)
        return
    verification = verify_checkpoint(damaged, source=source)
    assert not verification.ok
    assert verification.problems


def test_loss_of_the_sample_differs_from_its_control(convert: Callable[..., Conversion]) -> None:
    verification = convert(sample_path()).verification
    assert verification is not None
    loss = next(check for check in verification.checks if check.name == "loss")
    assert loss.ok
    assert loss.control is not None
    assert loss.control > 1.5


def test_a_model_of_one_position_still_has_a_loss(
    tmp_path: Path, convert: Callable[..., Conversion]
) -> None:
    folder = checkpoints.write(tmp_path / "short", max_position_embeddings=1)
    verification = convert(folder).verification
    assert verification is not None
    assert verification.ok


def test_results_have_a_table_as_text_and_as_html(source: Path, target: Path) -> None:
    verification = verify_checkpoint(target, source=source)
    assert "control" in str(verification)
    assert ">every check passed</caption>" in verification._repr_html_()
    rows = [row[1:5] for row in verification.table().rows]
    assert [(name, value, unit) for name, value, _, unit in rows] == [
        ("structure", "0", "tensors"),
        ("bits", "0", "elements"),
        ("rotated scores", "< 0.01", "% of the largest score"),
        ("logits", "< 0.1", "% of the largest logit"),
        ("loss", "< 0.001", "nats per token"),
    ]
    for _, _, control, _ in rows:
        assert float(control.replace(",", "")) > 0.1


@pytest.mark.parametrize(
    ("check", "value", "control"),
    [
        (Check("bits", False, 71606.0, 1.0, ""), "71,606", "1"),
        (Check("logits", False, float("inf"), None, "", 1e-3), "inf", "—"),
        (Check("logits", False, float("nan"), 0.5, "", 1e-3), "nan", "50"),
        (Check("rotated scores", False, 12.3456, 0.94, "", 1e-4), "1,235", "94"),
        (Check("structure", False, float("inf"), 1e12, ""), "inf", "1,000,000,000,000"),
    ],
)
def test_figures_are_shown_in_their_unit(check: Check, value: str, control: str) -> None:
    assert (check.shown_value(), check.shown_control()) == (value, control)


def test_a_target_file_that_was_cut_fails_the_structure(
    source: Path, convert: Callable[..., Conversion]
) -> None:
    target = convert(convert(source, "dcp").target, "back").target
    file = next(target.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    (check,) = verify_checkpoint(target, source=source).checks
    assert not check.ok
    assert "100 bytes are missing" in check.detail


@pytest.mark.parametrize("to", ["meta", "hf", "dcp"])
def test_a_target_without_a_receipt_is_checked_by_its_format(
    source: Path, convert: Callable[..., Conversion], to: str
) -> None:
    target = convert(source, verified=False, to=to).target
    (target / "llamaconv.json").unlink()
    assert verify_checkpoint(target, source=source).ok
    damage.exchange_two_rows(target)
    assert not verify_checkpoint(target, source=source).ok


def test_picture_of_the_scores_has_alternative_text(
    source: Path, target: Path, load_dcp: Callable[[Path], dict[str, Tensor]]
) -> None:
    def swap(state: dict[str, Tensor]) -> None:
        state[WQ] = state[WQ].flip(0)

    good = verify_checkpoint(target, source=source)
    bad = verify_checkpoint(resaved(target, load_dcp, swap), source=source)
    assert "In every layer the scores of the conversion agree" in figures.score_errors(good).alt
    assert "differ from the source's in 1 of 12 layers (5)" in figures.score_errors(bad).alt
    nothing = figures.score_errors(Verification(good.checks[:1]))
    assert "No scores were compared" in nothing.alt


def test_two_positional_paths_are_a_type_error(source: Path, target: Path) -> None:
    with pytest.raises(TypeError):
        verify_checkpoint(source, target)  # type: ignore[misc]
