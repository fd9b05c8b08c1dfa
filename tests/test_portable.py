"""What only Linux has is hidden, as on macOS: notebooks' functions and the commands work without."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest
from support import checkpoints

from llamaconv import Target, convert_checkpoint, make_plan, open_checkpoint
from llamaconv.cli import main
from llamaconv.convert import direct, disk, sync


class NoRenameat2:
    """A C library that has no such call."""

    def __init__(self, *_arguments: object, **_options: object) -> None:
        pass


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("posix_fadvise", "preadv", "fdatasync", "copy_file_range", "sendfile"):
        monkeypatch.delattr(os, name)
    monkeypatch.setattr(sync, "_sync_data", os.fsync)
    monkeypatch.setattr(direct, "_O_DIRECT", 0)
    monkeypatch.setattr(ctypes, "CDLL", NoRenameat2)


@pytest.mark.parametrize("to", ["dcp", "hf", "meta"])
def test_a_conversion_and_its_checks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    monkeypatch.setattr(disk, "_MOST_CACHED_BYTES", 0)  # as a long target
    monkeypatch.setattr(disk, "_LONG_FILE_BYTES", 0)
    plan = make_plan(open_checkpoint(checkpoints.write(tmp_path / "source")), Target(to=to))  # type: ignore[arg-type]
    done = convert_checkpoint(plan, tmp_path / "target")
    assert done.verification is not None
    assert done.verification.ok


def test_the_commands(tmp_path: Path) -> None:
    source, target = str(checkpoints.write(tmp_path / "source")), str(tmp_path / "target")
    assert main(["inspect", source, "--values"]) == 0
    assert main(["plan", source]) == 0
    assert main(["convert", source, target]) == 0
    before = (tmp_path / "target" / "llamaconv.json").stat().st_ino
    # A target that is there is replaced without an exchange of names.
    assert main(["convert", source, target, "--overwrite", "--dtype", "float32"]) == 0
    assert (tmp_path / "target" / "llamaconv.json").stat().st_ino != before
    assert [path.name for path in tmp_path.iterdir() if "llamaconv-" in path.name] == []
    assert main(["verify", source, target]) == 0
    assert main(["compare", source, target]) == 0
