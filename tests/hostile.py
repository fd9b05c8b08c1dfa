"""What the tests of hostile files share: how a folder has to be refused, and in which bounds."""

from __future__ import annotations

import atexit
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import checkpoints
import pytest

from llamaconv import RefusedError, Target, convert_checkpoint, make_plan, open_checkpoint
from llamaconv.cli import main

# No test here should take a second; this only has to tell slow from never.
SECONDS = 120
# torch itself has some 300 MB resident; each bomb would be gigabytes.
MOST_BYTES = 800_000_000


SMALL = replace(checkpoints.GQA, n_layers=2)


@cache
def _made(kind: str) -> Path:
    """A folder of a small model that is whole, made once; hundreds of tests each bend a copy."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    if kind == "meta":
        source, target = _made("single"), Target(to="meta")
        return convert_checkpoint(
            make_plan(open_checkpoint(source), target), folder / kind, verified=False
        ).target
    shards = 3 if kind == "sharded" else 1
    return checkpoints.write_model(folder / kind, SMALL, shards=shards)


def sharded(folder: Path) -> Path:
    """A Hugging Face folder of three shards and an index."""
    return Path(shutil.copytree(_made("sharded"), folder))


def single(folder: Path) -> Path:
    """A Hugging Face folder with model.safetensors."""
    return Path(shutil.copytree(_made("single"), folder))


def meta(folder: Path) -> Path:
    """A consolidated.00.pth with its params.json, and no receipt."""
    shutil.copytree(_made("meta"), folder)
    (folder / "llamaconv.json").unlink()
    return folder


def refusal(folder: Path, **options: str) -> str:
    """What `open_checkpoint` and `make_plan` say of a folder that has to be refused."""
    with pytest.raises(RefusedError) as caught:
        make_plan(open_checkpoint(folder), Target(**options)).check()  # type: ignore[arg-type]
    said = str(caught.value)
    assert said
    assert all(line.startswith(("error: ", "warning: ")) for line in said.split("\n"))
    assert said.replace("\n", "").isprintable()
    return said


def convert(folder: Path, *options: str) -> None:
    """Through the command line: it has to be refused with 2, and nothing be written."""
    target = folder.parent / "target-of-hostile"
    assert main(["convert", str(folder), str(target), *options]) == 2
    assert not target.exists()


def bounded(*folders: Path) -> list[str]:
    """The refusals of several folders, in a process of bounded memory and time."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))

    process = subprocess.Popen(
        [sys.executable, __file__, *map(str, folders)],
        stdout=subprocess.PIPE,
        preexec_fn=limit,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        out, _ = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    assert process.returncode == 0, process.returncode
    lines = [json.loads(line) for line in out.splitlines()]
    assert len(lines) == len(folders)
    for folder, line in zip(folders, lines, strict=True):
        assert line["peak"] < MOST_BYTES, (folder.name, line["peak"])
    return [line["said"] for line in lines]


def _main(folders: list[str]) -> None:
    for folder in folders:
        try:
            make_plan(open_checkpoint(folder)).check()
            said = ""
        except RefusedError as error:
            said = str(error)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"said": said, "peak": peak}), flush=True)


if __name__ == "__main__":
    _main(sys.argv[1:])
