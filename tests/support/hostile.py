"""What the tests of hostile files share: how a folder has to be refused, and in which bounds."""

from __future__ import annotations

import atexit
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from llamaconv import RefusedError, Target, convert_checkpoint, make_plan, open_checkpoint
from llamaconv.cli import main
from support import checkpoints, torch_memory

# No test here should take a second; this only has to tell slow from never.
SECONDS = 120
# On top of a process that has only imported torch; each bomb would be gigabytes.
MOST_BYTES = 450_000_000
MOST_ADDRESSES = 6 << 30


SIDE = Path(__file__).with_name("hostile_side.py")
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
        make_plan(open_checkpoint(folder), Target(**options)).raise_for_errors()  # type: ignore[arg-type]
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


def put(path: Path, kind: str) -> None:
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            here = os.getcwd()
            os.chdir(path.parent)  # the name of a socket may have a hundred letters
            try:
                made.bind(path.name)
            finally:
                os.chdir(here)
    elif kind == "loop":
        path.symlink_to(path.name)
    else:
        path.symlink_to(kind)


def bounded(*folders: Path) -> list[str]:
    """The refusals of several folders, in a process of bounded memory and time."""

    addresses = torch_memory.reserved() + MOST_ADDRESSES

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (addresses, addresses))

    process = subprocess.Popen(
        [sys.executable, str(SIDE), *map(str, folders)],
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
        assert line["peak"] < torch_memory.resident() + MOST_BYTES, (folder.name, line["peak"])
    return [line["said"] for line in lines]
