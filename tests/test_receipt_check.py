"""A folder checked against its receipt alone, in every format."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch

from llamaconv import RefusedError, verify_checkpoint
from llamaconv.cli import main
from llamaconv.convert import Conversion
from llamaconv.formats.huggingface import INDEX
from llamaconv.receipt_check import verify_receipt

TARGETS: list[dict[str, Any]] = [
    {},
    {"shards": 3, "dtype": "float32"},
    {"to": "meta", "shards": 2},
    {"to": "hf", "max_shard_size": 300_000, "dtype": "float32"},
]


@pytest.mark.parametrize("options", TARGETS, ids=str)
def test_untouched_passes_and_one_flipped_bit_anywhere_is_seen(
    source: Path, convert: Callable[..., Conversion], options: dict[str, Any]
) -> None:
    target = convert(source, verified=False, **options).target
    verification = verify_receipt(target)
    assert verification.ok
    digests = verification.checks[1]
    assert digests.yardstick is not None
    assert digests.yardstick > 100
    for suffix in (".distcp", ".pth", ".safetensors"):
        for file in target.glob(f"*{suffix}"):
            content = bytearray(file.read_bytes())
            content[len(content) * 2 // 3] ^= 16
            file.write_bytes(content)
            assert not verify_receipt(target).ok, file
            content[len(content) * 2 // 3] ^= 16
            file.write_bytes(content)
    assert verify_receipt(target).ok


def test_a_folder_without_a_receipt_needs_its_source(source: Path) -> None:
    with pytest.raises(RefusedError, match="llamaconv verify SRC DST"):
        verify_receipt(source)


def test_on_the_command_line_with_one_path(
    source: Path, convert: Callable[..., Conversion], capsys: pytest.CaptureFixture[str]
) -> None:
    target = convert(source, verified=False).target
    assert main(["verify", str(target)]) == 0
    assert "111 tensors have the bytes that were written" in capsys.readouterr().out
    (target / "__0_0.distcp").unlink()
    with pytest.raises(SystemExit) as ended:
        main(["verify", str(target)])
    assert ended.value.code == 1
    assert "error: check structure failed" in capsys.readouterr().err


def edit(name: str, **entries: Any) -> Callable[[Path], None]:
    return lambda folder: checkpoints.edit_json(
        folder / name, lambda content: content.update(entries)
    )


def bend_the_second_copy_of_a_norm(folder: Path) -> None:
    file = folder / "consolidated.01.pth"
    state = torch.load(file, weights_only=True)
    state["norm.weight"].view(torch.int16)[5] ^= 1
    torch.save(state, file)


@pytest.mark.parametrize(
    ("options", "damage", "said"),
    [
        (
            TARGETS[3],
            edit("config.json", rope_theta=5e5),
            "rope_theta is 500000.0, 10000.0 expected",
        ),
        (TARGETS[3], edit("config.json", torch_dtype="float16"), "torch_dtype is 'float16'"),
        (TARGETS[3], edit("config.json", architectures=["LlamaModel"]), "architectures is"),
        (TARGETS[3], edit("config.json", vocab_size=None), "vocab_size is absent"),
        (TARGETS[3], lambda folder: (folder / "config.json").unlink(), "config.json is not there"),
        (TARGETS[3], lambda folder: (folder / INDEX).unlink(), f"{INDEX} is not there"),
        (TARGETS[2], edit("params.json", norm_eps=1e-6), "norm_eps is 1e-06, 1e-05 expected"),
        (
            TARGETS[2],
            edit("params.json", multiple_of=256),
            "by Meta's formula, the weights have 96",
        ),
        (TARGETS[2], edit("params.json", use_scaled_rope=True), "use_scaled_rope is True"),
        (TARGETS[2], bend_the_second_copy_of_a_norm, "1 norms differ between the files"),
    ],
)
def test_what_is_said_beside_the_weights_is_held_against_the_receipt_and_the_source(
    source: Path,
    convert: Callable[..., Conversion],
    options: dict[str, Any],
    damage: Callable[[Path], None],
    said: str,
) -> None:
    target = convert(source, verified=False, **options).target
    damage(target)
    for verification in (verify_receipt(target), verify_checkpoint(source, target)):
        (check,) = verification.checks
        assert check.name == "structure"
        assert not check.ok
        assert said in check.detail


@pytest.mark.parametrize(
    ("edited", "said"),
    [
        (lambda entries: entries["tensors"][3].update(digests=["0" * 32]), "have changed since"),
        (lambda entries: entries["tensors"][3].update(operation="tie"), "reorder') expected"),
        (lambda entries: entries["source"].update(rope="interleaved"), "half_split' expected"),
        (lambda entries: entries["dropped"].append({"source": "x", "reason": ""}), "dropped"),
    ],
)
def test_a_receipt_that_tells_another_story_than_the_source_is_caught_with_it(
    source: Path, convert: Callable[..., Conversion], edited: Callable[[Any], Any], said: str
) -> None:
    target = convert(source, verified=False).target
    checkpoints.edit_json(target / "llamaconv.json", edited)
    check = verify_checkpoint(source, target).checks[-1]
    assert check.name == "receipt"
    assert said in check.detail


def test_another_copy_of_the_source_may_tell_it_otherwise(
    source: Path, tmp_path: Path, convert: Callable[..., Conversion]
) -> None:
    target = convert(source, verified=False).target
    meta = convert(source, "meta", verified=False, to="meta").target
    assert verify_checkpoint(meta, target).ok
    shutil.copytree(source, tmp_path / "moved")
    assert verify_checkpoint(tmp_path / "moved", target).ok


def test_a_damaged_receipt_is_the_reason_that_is_given(
    source: Path, convert: Callable[..., Conversion]
) -> None:
    target = convert(source, verified=False).target
    (target / "llamaconv.json").write_text("{")
    with pytest.raises(RefusedError, match=r"llamaconv\.json: not valid JSON"):
        verify_receipt(target)
