"""A call to the system fails, or the process dies at it: at every step of a conversion in turn.

SQLite is tested so. A conversion of a tiny model is run once to count its calls; then again and
again, and each time the next call fails. After each: success, or one clear message and a status
that says so; the old target to the byte, or the new one; nothing beside it but what is known by
its name; and a second run that gives the bytes of an undisturbed one.

The ordinary run takes a few steps at random (``LLAMACONV_SEED`` repeats it).
``LLAMACONV_FAULTS=all`` takes every step, ``LLAMACONV_FAULTS=10`` ten times as many.

Not made here: a power failure (what is on the disk without an fsync); `test_what_is_in_place_is_on_the_disk`
reads the order of calls instead. Nor a mapped page that cannot be read (SIGBUS).
"""

from __future__ import annotations

import random
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import checkpoints
import pytest
from faults import KINDS, PARTIAL, Fault, Scene, Server, seed, some_steps

TARGETS = ("dcp", "hf", "meta")
WRITES = ("create", "write", "sync", "close", "rename", "mkdir", "truncate")
FILES = tuple(kind for kind in KINDS if kind != "thread")

MOVERS = ("write", "writev", "pwrite64", "pwritev64v2", "sendfile64", "copy_file_range")
SYNCS = ("fsync", "fdatasync")

_REASON = "staging or the writers have to sync params.json and the copies of tokenizers"
SMALL_FILES_NOT_SYNCED = [
    pytest.param(to, marks=pytest.mark.xfail(reason=_REASON)) for to in ("hf", "meta")
]

FAULTS = {
    "the disk fills up, and stays full": Fault("ENOSPC", kinds=WRITES, onwards=True),
    "no room, once": Fault("ENOSPC", kinds=WRITES),
    "over quota": Fault("EDQUOT", kinds=WRITES),
    "input or output error, once": Fault("EIO", kinds=FILES),
    "input or output error from now on": Fault("EIO", kinds=FILES, onwards=True),
    "interrupted": Fault("EINTR", kinds=("open", "create", "read", "write", "sync", "lock")),
    "too many open files": Fault("EMFILE", kinds=("open", "create", "list"), onwards=True),
    "half of it": Fault("half", kinds=("read", "write")),
    "always half of it": Fault("half", kinds=("read", "write"), onwards=True),
    "killed": Fault("kill", kinds=KINDS),
    "no thread": Fault("EAGAIN", kinds=("thread",)),
}


def tiny(folder: Path) -> Path:
    """A model of one layer in two shards, with a tokenizer to copy."""
    checkpoints.write_model(folder, replace(checkpoints.GQA, n_layers=1), shards=2)
    (folder / "tokenizer.json").write_text('{"model": {}}')
    (folder / "tokenizer.model").write_bytes(b"a tokenizer of Meta's")
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("runs")) as server:
        yield server


Scenes = Callable[[str, bool], Scene]


@pytest.fixture(scope="module")
def scene(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Scenes:
    """A scene by format, and with or without an old target; made once, to be reset."""
    root = tmp_path_factory.mktemp("scenes")
    made: dict[tuple[str, bool], Scene] = {}

    def get(to: str, with_old: bool) -> Scene:
        if (to, with_old) not in made:
            # One thread that writes: the k-th call is the same one in every run.
            options = ["--to", to, "--workers", "1", *(["--shards", "2"] if to == "meta" else [])]
            name = f"{to}-{'over' if with_old else 'new'}"
            made[to, with_old] = Scene(server, root / name, tiny, options, with_old)
        made[to, with_old].reset()
        return made[to, with_old]

    return get


def why(error: AssertionError) -> str:
    """What was asserted, a line."""
    return str(error).split("\n", 1)[0] or traceback.extract_tb(error.__traceback__)[-1].line or ""


@pytest.mark.parametrize("with_old", [False, True], ids=["new", "over an old one"])
@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("what", FAULTS)
def test_a_fault_at_a_step(scene: Scenes, what: str, to: str, with_old: bool) -> None:
    here, fault = scene(to, with_old), FAULTS[what]
    steps = here.steps(fault.kinds)
    chosen = some_steps(steps, 2, random.Random(seed()))
    wrong = []
    for at in chosen:
        here.reset()
        run = here.run(replace(fault, at=at))
        try:
            assert run.fired, "the step was not reached"
            if fault.action == "half":
                assert run.status == 0, run.said
            here.check(run)
            here.check_second_run()
        except AssertionError as error:
            called = ", ".join(run.fired[:1]).replace(str(here.root), "")
            wrong.append(f"{at} ({called}), status {run.status}: {why(error)}; {run.said[-300:]}")
    print(f"{what}, {to}: {len(chosen)} of {len(steps)} steps")
    assert not wrong, f"{len(wrong)} of {len(chosen)} steps:\n" + "\n".join(wrong[:200])


@pytest.mark.parametrize("to", TARGETS)
def test_a_filesystem_without_mmap(scene: Scenes, to: str) -> None:
    """Source and target alike; safetensors and `torch.load` would map both in the checks."""
    here = scene(to, False)
    run = here.run(Fault("ENODEV", at=1, kinds=("map",), onwards=True))
    assert run.fired, "nothing was mapped: there is no such fault any more"
    here.check(run)
    assert run.status == 0


@pytest.mark.parametrize("to", TARGETS)
def test_weights_that_never_reach_the_disk_fail_the_checks(scene: Scenes, to: str) -> None:
    """A write of weights says that it wrote and did not: the file has its length, and zeros."""
    here = scene(to, True)
    fault = Fault("lost", kinds=("write",), only={"dcp": ".distcp", "hf": ".safet"}.get(to, ".pth"))
    calls = here.run(replace(fault, at=0)).calls
    # What is written right after a read of the source is weights, not what lies around them.
    weights, at, before = [], 0, ""
    for call in calls:
        at += call[0] == "+"
        if call[0] == "+" and str(here.source) in before:
            weights.append(at)
        before = call
    assert len(weights) >= 12
    for at in some_steps(weights, 2, random.Random(seed())):
        here.reset()
        run = here.run(replace(fault, at=weights[at - 1]))
        here.check(run)
        assert run.fired
        assert run.status == 1
        assert "error: check" in run.said


@pytest.mark.parametrize("to", ["dcp", *SMALL_FILES_NOT_SYNCED])
def test_what_is_in_place_is_on_the_disk(scene: Scenes, to: str) -> None:
    """Each file is synced after its last write and before the folder takes its name."""
    here = scene(to, True)
    calls = [tuple(call[1:].split(" ", 1)) for call in here.run(Fault()).calls]
    partial = f"{here.target}{PARTIAL}"
    (placed,) = (n for n, call in enumerate(calls) if call == ("renameat2", str(here.target)))
    late = []
    for name in here.new:
        path = f"{partial}/{name}"
        written = [n for n, (call, of) in enumerate(calls) if of == path and call in MOVERS]
        # torch writes .metadata under another name.
        synced = [n for n, (call, of) in enumerate(calls) if of == path and call in SYNCS]
        if name == ".metadata":
            synced = [n for n, (call, of) in enumerate(calls) if "metadata" in of and call in SYNCS]
        if not synced or max(written, default=0) > max(synced) or max(synced) > placed:
            late.append(name)
    assert not late, f"in place, and perhaps not on the disk: {late}"
    folders = [n for n, call in enumerate(calls) if call == ("fsync", partial)]
    assert folders
    assert max(folders) < placed
    assert ("fsync", str(here.root)) in calls[placed:]
