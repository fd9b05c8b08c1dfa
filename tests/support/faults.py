"""Runs of the command line in which chosen calls to the system fail, and what must hold after.

`faults.c` sits between a process and libc, so the calls of torch and safetensors fail as well as
Python's. `Server` starts the runs, `Scene` has the folders and knows what must hold of them.
"""

from __future__ import annotations

import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import xxhash

from support import checkpoints

HERE = Path(__file__).parent
# The order is that of faults.c.
KINDS = (
    "open", "create", "read", "write", "sync", "close", "rename", "mkdir", "unlink", "truncate",
    "stat", "list", "map", "lock", "thread",
)  # fmt: skip
ACTIONS = {"half": -1, "lost": -2, "kill": -3, "stop": -4}
PARTIAL, OLD = ".llamaconv-partial", ".llamaconv-old"
HANGS_S = 120


@dataclass(frozen=True)
class Fault:
    """What happens at the ``at``-th call of ``kinds`` that concerns a path with ``only`` in it.

    ``action`` is the name of an errno, or one of `ACTIONS`. With ``onwards`` it happens at every
    later one too. ``at`` 0 never comes: the calls are logged.
    """

    action: str = "EIO"
    at: int = 0
    kinds: tuple[str, ...] = KINDS
    onwards: bool = False
    only: str = ""

    def numbers(self) -> list[Any]:
        import errno

        action = ACTIONS.get(self.action) or getattr(errno, self.action)
        kinds = sum(1 << KINDS.index(kind) for kind in self.kinds)
        return [self.only, kinds, self.at, action, int(self.onwards)]


@dataclass(frozen=True)
class Run:
    """How a run ended: ``status`` is negative for a signal, None where it stopped only."""

    process: int
    status: int | None
    said: str
    calls: tuple[str, ...]
    seconds: float
    printed: str = ""

    @property
    def fired(self) -> list[str]:
        """The calls that were acted upon."""
        return [call[1:] for call in self.calls if call[0] == "!"]

    @property
    def counted(self) -> list[str]:
        """The calls of the fault's kinds, in order."""
        return [call[1:] for call in self.calls if call[0] in "!+"]


class Server:
    """Starts runs. As a context manager, it ends what it started."""

    def __init__(
        self, folder: Path, faulty: bool = True, environment: Mapping[str, str] | None = None
    ) -> None:
        """``faulty`` is whether runs may be given a `Fault`, which takes a C compiler."""
        self.folder = folder
        self.number = 0
        self.running: dict[int, int] = {}
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
        if faulty:
            variables["LD_PRELOAD"] = str(_shim(folder))
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "fault_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=variables,
            bufsize=0,
        )

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.running:
            os.kill(process, signal.SIGKILL)
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(HANGS_S) == 0

    def start(
        self,
        arguments: Sequence[str | Path],
        root: Path,
        fault: Fault | None = None,
        file_limit: int | None = None,
        direct: bool = False,
        constants: Mapping[str, Any] | None = None,
    ) -> int:
        """Begins ``llamaconv ARGUMENTS``; calls below ``root`` are seen. The number of a process.

        ``file_limit`` is the longest that a file may grow, in bytes. ``direct``: its files are written
        around the page cache, however short. ``constants`` are set in modules, by ``MODULE.NAME``.
        """
        self.number += 1
        request: dict[str, Any] = {"arguments": [str(one) for one in arguments], "direct": direct}
        request["constants"] = dict(constants or {})
        request |= {name: str(self._file(name, self.number)) for name in ("out", "err", "log")}
        if fault:
            request["fault"] = [str(root), *fault.numbers()]
        if file_limit is not None:
            request["file_limit"] = file_limit
        process = int(self._ask(request)["process"])
        self.running[process] = self.number
        return process

    def wait(self, process: int) -> Run:
        """What became of a run that was started, once it ended or stopped."""
        number = self.running[process]
        answer = self._ask({"wait": process})
        if answer["status"] is not None:
            del self.running[process]
        # A process that was killed at its beginning has opened neither.
        files = (self._file(name, number) for name in ("err", "log", "out"))
        said, calls, out = (file.read_text() if file.exists() else "" for file in files)
        lines = tuple(calls.splitlines())
        return Run(process, answer["status"], said, lines, answer["seconds"], out)

    def run(self, arguments: Sequence[str | Path], root: Path, *rest: Any, **options: Any) -> Run:
        """`start`, and `wait`."""
        return self.wait(self.start(arguments, root, *rest, **options))

    def _file(self, name: str, number: int) -> Path:
        return self.folder / f"{name}.{number}"

    def _ask(self, request: Mapping[str, Any]) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        readable, _, _ = select.select([self.process.stdout], [], [], HANGS_S)
        assert readable, f"hangs: {request}"
        return json.loads(self.process.stdout.readline())


def _shim(folder: Path) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not sys.platform.startswith("linux") or compiler is None:
        reason = "NO FAULT WAS INJECTED: calls are made to fail on Linux, with a C compiler"
        # Where faults were asked for by name, none must not look well.
        (pytest.fail if repeats() != 1 else pytest.skip)(reason)
    library = folder / "faults.so"
    subprocess.run(
        [
            compiler,
            "-shared",
            "-fPIC",
            "-O1",
            "-o",
            library,
            HERE / "faults.c",
            "-ldl",
            "-lpthread",
        ],
        check=True,
    )
    return library


def repeats() -> float:
    """How much more than the ordinary run is asked for, by ``LLAMACONV_FAULTS``.

    A factor, or ``all``: every step, and 50 random moments.
    """
    asked = os.environ.get("LLAMACONV_FAULTS", "1")
    return float("inf") if asked == "all" else float(asked)


def seed() -> int:
    """The seed of what is chosen at random, printed; ``LLAMACONV_SEED`` gives one."""
    chosen = int(os.environ.get("LLAMACONV_SEED", random.SystemRandom().randrange(1 << 32)))
    print(f"LLAMACONV_SEED={chosen}")
    return chosen


def some_steps(steps: Sequence[object], most: int, chance: random.Random) -> list[int]:
    """Numbers, from 1, of at most ``most`` steps: every kind of call and file alike likely."""
    if most * repeats() >= len(steps):
        return list(range(1, len(steps) + 1))
    alike: dict[object, list[int]] = {}
    for number, step in enumerate(steps, 1):
        alike.setdefault(step, []).append(number)
    groups = list(alike.values())
    chosen = {chance.choice(chance.choice(groups)) for _ in range(int(most * repeats()))}
    return sorted(chosen)


def content(folder: Path) -> dict[str, str]:
    """A digest of each file; the receipt's without the time at which it was written."""
    found = {}
    for path in sorted(folder.iterdir()):
        data = path.read_bytes() if path.is_file() else b"a folder"
        if path.name == "llamaconv.json":
            receipt = json.loads(data)
            receipt["created"] = ""
            for check in (receipt["verified"] or {"checks": []})["checks"]:
                check["detail"] = ""  # says how the files were read
            data = json.dumps(receipt).encode()
        found[path.name] = xxhash.xxh3_128(data).hexdigest()
    return found


class Scene:
    """A source, a target that may be there already, and what a run must leave of them.

    ``options`` are those of ``llamaconv convert``. What an undisturbed run writes is found out
    once; ``old`` is the content of the target that is there before, if any. ``others`` may be
    filled with what other runs to the same target write. With ``direct`` all later runs write
    around the page cache.
    """

    def __init__(
        self,
        server: Server,
        root: Path,
        make_source: Callable[[Path], Path],
        options: Sequence[str],
        with_old: bool,
        direct: bool = False,
    ) -> None:
        self.server, self.root, self.direct = server, root, direct
        root.mkdir(parents=True)
        self.source = make_source(root / "source")
        self.target, self.partial = root / "target", root / f"target{PARTIAL}"
        self.options = [*options, "--quiet"]
        undisturbed = server.run(self.arguments, root, Fault())
        assert undisturbed.status == 0, undisturbed.said
        self.new = content(self.target)
        self.sources = content(self.source)
        self.old: dict[str, str] = {}
        self._steps: dict[tuple[str, ...], list[str]] = {}
        self.others: list[dict[str, str]] = []
        self.spare = root.with_name(root.name + "-spare")
        shutil.rmtree(self.target)
        if with_old:
            # The same names, other bytes, and one file more: a mixture would show.
            made = server.run([*self.arguments, "--dtype", "float32", *more_files(options)], root)
            assert made.status == 0, made.said
            self.old = content(self.target)
            os.rename(self.target, self.spare)
            self.options.append("--overwrite")

    @property
    def arguments(self) -> list[str | Path]:
        return ["convert", self.source, self.target, *self.options]

    def steps(self, kinds: Sequence[str], only: str = "") -> list[str]:
        """Every call of ``kinds`` in an undisturbed run, in order."""
        key = (*kinds, only)
        if key not in self._steps:
            self.reset()
            self._steps[key] = self.run(Fault(kinds=tuple(kinds), only=only)).counted
            self.reset()
        return self._steps[key]

    def reset(self) -> None:
        """As it was before any run."""
        for path in self.root.iterdir():
            if path.is_dir() and path != self.source:
                shutil.rmtree(path)
        if self.old:
            shutil.copytree(self.spare, self.target)

    def run(self, fault: Fault | None = None) -> Run:
        return self.server.run(self.arguments, self.root, fault, direct=self.direct)

    def start(self, fault: Fault | None = None, more: Sequence[str] = ()) -> int:
        arguments = [*self.arguments, *more]
        return self.server.start(arguments, self.root, fault, direct=self.direct)

    def check(self, run: Run) -> None:
        """What must hold after any run, whatever happened to it."""
        assert run.status in (0, 1, 2, 130, -signal.SIGKILL), run.said
        self.check_folders()
        lines = run.said.splitlines()
        assert "Traceback" not in run.said
        if run.status == 0:
            assert self.found == self.new, "success, and another target"
            assert not lines
        elif run.status != -signal.SIGKILL:
            assert lines, "failed without a word"
            assert lines[0].startswith("error: "), run.said
            assert all(line.startswith(("error: ", "note: ")) for line in lines), run.said
            # One for each check that failed; else of the disk, at most one for each of what is read
            # apart (weights, config.json, small files).
            assert sum("error: check " not in line for line in lines) <= 3, run.said
            assert all(len(line) > 30 for line in lines), run.said

    def check_folders(self) -> None:
        """Old or new to the byte under the target's name, and what is left over is known by it."""
        names = {path.name for path in self.root.iterdir()}
        allowed = {"source", "target", "target-train", f"target{PARTIAL}", f"target{OLD}"}
        assert names <= allowed, names - allowed
        assert content(self.source) == self.sources, "the source is another"
        self.found = content(self.target) if self.target.exists() else {}
        assert self.found in [self.old, self.new, *self.others], (
            f"neither old nor new: {sorted(self.found)}"
        )

    def check_second_run(self) -> None:
        """Run again without a fault, it gives the bytes of an undisturbed run, and tidies up."""
        again = [*self.arguments, "--overwrite"] if self.found == self.new else self.arguments
        run = self.server.run(again, self.root)
        assert run.status == 0, run.said
        assert content(self.target) == self.new
        names = {path.name for path in self.root.iterdir()}
        assert names - {"target-train"} == {"source", "target"}


def tiny(folder: Path) -> Path:
    """A model of one layer in two shards, with a tokenizer to copy."""
    checkpoints.write_model(folder, replace(checkpoints.GQA, n_layers=1), shards=2)
    (folder / "tokenizer.json").write_text('{"model": {}}')
    (folder / "tokenizer.model").write_bytes(b"a tokenizer of Meta's")
    return folder


def more_files(options: Sequence[str]) -> list[str]:
    """Options by which a target has another number of files than with ``options``."""
    if "hf" in options:
        return ["--max-shard-size", "10KB"]
    return ["--shards", "1" if "meta" in options else "3"]
