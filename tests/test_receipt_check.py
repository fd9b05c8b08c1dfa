"""A folder checked against its receipt alone, in every format."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamaconv import RefusedError
from llamaconv.cli import main
from llamaconv.convert import Conversion
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
