"""A folder checked against its receipt alone, in every format."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import checkpoints

from llamaconv import RefusedError, verify_checkpoint
from llamaconv.checkpoint.huggingface_index import INDEX
from llamaconv.cli import main
from llamaconv.convert.convert import Conversion

TARGETS: list[dict[str, Any]] = [
    {},
    {"shards": 3, "dtype": "float32"},
    {"to": "meta", "shards": 2},
    {"to": "hf", "max_shard_size": 300_000, "dtype": "float32"},
]


@pytest.mark.parametrize("options", TARGETS, ids=str)
def test_unchanged_target_passes_and_any_flipped_bit_is_found(
    source: Path, convert: Callable[..., Conversion], options: dict[str, Any]
) -> None:
    target = convert(source, verified=False, **options).target
    verification = verify_checkpoint(target)
    assert verification.ok
    digests = verification.checks[1]
    assert digests.control is not None
    assert digests.control > 100
    for suffix in (".distcp", ".pth", ".safetensors"):
        for file in target.glob(f"*{suffix}"):
            content = bytearray(file.read_bytes())
            content[len(content) * 2 // 3] ^= 16
            file.write_bytes(content)
            assert not verify_checkpoint(target).ok, file
            content[len(content) * 2 // 3] ^= 16
            file.write_bytes(content)
    assert verify_checkpoint(target).ok


def test_damage_around_the_weights_that_torch_cannot_read_is_found(
    source: Path, convert: Callable[..., Conversion]
) -> None:
    """No digest is of those bytes."""
    file = convert(source, verified=False).target / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    # 22 letters of its name and 50 bytes of padding before it; 128 is no letter of UTF-8.
    content[content.index(b".data/serialization_id") + 80] ^= 128
    file.write_bytes(content)
    digests = verify_checkpoint(file.parent).checks[1]
    assert not digests.ok
    assert "torch's own loader fails" in digests.detail


def test_folder_without_a_receipt_is_refused_without_its_source(source: Path) -> None:
    with pytest.raises(RefusedError, match="llamaconv verify SRC DST"):
        verify_checkpoint(source)


def test_verify_command_with_one_path_checks_the_receipt(
    source: Path, convert: Callable[..., Conversion], capsys: pytest.CaptureFixture[str]
) -> None:
    target = convert(source, verified=False).target
    assert main(["verify", str(target)]) == 0
    assert "111 tensors have the bytes that were written" in capsys.readouterr().out
    (target / "__0_0.distcp").unlink()
    assert main(["verify", str(target)]) == 1
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
            "rope_theta is 500000.0; expected 10000.0",
        ),
        (TARGETS[3], edit("config.json", torch_dtype="float16"), "torch_dtype is 'float16'"),
        (TARGETS[3], edit("config.json", architectures=["LlamaModel"]), "architectures is"),
        (
            TARGETS[3],
            edit("config.json", vocab_size=None),
            "vocab_size must be a positive whole number; it is missing",
        ),
        (TARGETS[3], lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (TARGETS[3], lambda folder: (folder / INDEX).unlink(), f"{INDEX} is missing"),
        (TARGETS[2], edit("params.json", norm_eps=1e-6), "norm_eps is 1e-06; expected 1e-05"),
        (
            TARGETS[2],
            edit("params.json", multiple_of=256),
            "by Meta's formula, the weights have 96",
        ),
        (TARGETS[2], edit("params.json", use_scaled_rope=True), "use_scaled_rope is True"),
        (TARGETS[2], bend_the_second_copy_of_a_norm, "1 norms differ between the files"),
    ],
)
def test_wrong_entries_next_to_the_weights_fail_the_structure(
    source: Path,
    convert: Callable[..., Conversion],
    options: dict[str, Any],
    damage: Callable[[Path], None],
    said: str,
) -> None:
    target = convert(source, verified=False, **options).target
    damage(target)
    for verification in (verify_checkpoint(target), verify_checkpoint(target, source=source)):
        (check,) = verification.checks
        assert check.name == "structure"
        assert not check.ok
        assert said in check.detail


@pytest.mark.parametrize(
    ("edited", "said"),
    [
        (lambda entries: entries["tensors"][3].update(digests=["0" * 32]), "have changed since"),
        (lambda entries: entries["tensors"][3].update(operation="tie"), "; expected ('"),
        (lambda entries: entries["source"].update(rope="interleaved"), "expected 'half_split'"),
        (lambda entries: entries["dropped"].append({"source": "x", "reason": ""}), "dropped"),
    ],
)
def test_receipt_that_contradicts_the_source_fails_with_the_source(
    source: Path, convert: Callable[..., Conversion], edited: Callable[[Any], Any], said: str
) -> None:
    target = convert(source, verified=False).target
    checkpoints.edit_json(target / "llamaconv.json", edited)
    check = verify_checkpoint(target, source=source).checks[-1]
    assert check.name == "receipt"
    assert said in check.detail


def test_receipt_is_not_compared_with_another_copy_of_the_source(
    source: Path, tmp_path: Path, convert: Callable[..., Conversion]
) -> None:
    target = convert(source, verified=False).target
    meta = convert(source, "meta", verified=False, to="meta").target
    assert verify_checkpoint(target, source=meta).ok
    shutil.copytree(source, tmp_path / "moved")
    assert verify_checkpoint(target, source=tmp_path / "moved").ok


def test_damaged_receipt_is_refused_with_its_reason(
    source: Path, convert: Callable[..., Conversion]
) -> None:
    target = convert(source, verified=False).target
    (target / "llamaconv.json").write_text("{")
    with pytest.raises(RefusedError, match=r"llamaconv\.json: not valid JSON"):
        verify_checkpoint(target)
