"""A call to the system fails, or the process dies at it: at every step of a conversion in turn.

SQLite is tested so. A conversion of a tiny model is run once to count its calls; then again and
again, and each time the next call fails. After each: success, or one clear message and a status
that says so; the old target to the byte, or the new one; nothing beside it but what is known by
its name; and a second run that gives the bytes of an undisturbed one.

The ordinary run takes a few steps at random (``LLAMACONV_SEED`` repeats it).
``LLAMACONV_FAULTS=all`` takes every step, ``LLAMACONV_FAULTS=10`` ten times as many.

Not made here: a power failure (what is on the disk without an fsync); `test_target_is_fsynced_before_it_gets_its_name`
reads the order of calls instead. Nor a mapped page that cannot be read (SIGBUS).
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
from support.faults import KINDS, PARTIAL, Fault, Scene, Server, repeats, seed, some_steps, tiny

from llamaconv import Target, convert_checkpoint, make_plan, open_checkpoint
from llamaconv.report.errors import FailedError

TARGETS = ("dcp", "hf", "meta")
WRITES = ("create", "write", "sync", "close", "rename", "mkdir", "truncate")
FILES = tuple(kind for kind in KINDS if kind != "thread")

MOVERS = ("write", "writev", "pwrite64", "pwritev64v2", "sendfile64", "copy_file_range")
SYNCS = ("fsync", "fdatasync")

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
}


Scenes = Callable[[str, bool], Scene]


@pytest.fixture(scope="module")
def scene(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Scenes:
    """A scene by format, and with or without an old target; made once, to be reset."""
    root = tmp_path_factory.mktemp("scenes")
    made: dict[tuple[str, bool], Scene] = {}

    def get(to: str, with_old: bool) -> Scene:
        if (to, with_old) not in made:
            # One thread that writes: the k-th call is the same one in every run.
            kind, _, direct = to.partition(" ")
            options = ["--to", kind, "--workers", "1"]
            options += ["--shards", "2"] if kind == "meta" else []
            name = f"{kind}{bool(direct)}-{'over' if with_old else 'new'}"
            made[to, with_old] = Scene(
                server, root / name, tiny, options, with_old, direct=bool(direct)
            )
        made[to, with_old].reset()
        return made[to, with_old]

    return get


def why(error: AssertionError) -> str:
    """What was asserted, a line."""
    return str(error).split("\n", 1)[0] or traceback.extract_tb(error.__traceback__)[-1].line or ""


@pytest.mark.parametrize("with_old", [False, True], ids=["new", "over an old one"])
@pytest.mark.parametrize("to", [*TARGETS, "dcp directly", "meta directly"])
@pytest.mark.parametrize("what", FAULTS)
@pytest.mark.thorough
def test_fault_at_any_step_leaves_a_valid_state(
    scene: Scenes, what: str, to: str, with_old: bool
) -> None:
    here, fault = scene(to, with_old), FAULTS[what]
    steps = here.steps(fault.kinds)
    chosen = some_steps(steps, 1, random.Random(seed()))
    wrong = []
    for at in chosen:
        here.reset()
        run = here.run(replace(fault, at=at))
        # Threads that sync take a call more or less: the last step of one run is not in every run.
        for earlier in range(at - 1, max(at - 4, 0), -1):
            if run.fired:
                break
            here.reset()
            run = here.run(replace(fault, at=earlier))
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


@pytest.mark.thorough
def test_errors_after_the_target_was_replaced_do_not_deny_it(scene: Scenes) -> None:
    """The old one cannot be removed, or the folder above not be synced: true words, at least."""
    here = scene("dcp", True)
    fault = Fault("EIO", kinds=("unlink", "sync", "list"))
    steps = here.steps(fault.kinds)
    first = max(n for n, step in enumerate(steps) if step.startswith("unlinkat")) - 2
    for at in range(first, len(steps) + 1):
        here.reset()
        run = here.run(replace(fault, at=at))
        here.check(run)
        assert here.found == here.new
        assert "was not changed" not in run.said, run.fired


@pytest.mark.thorough
def test_thread_limit_fails_and_the_next_run_succeeds(scene: Scenes) -> None:
    """The system gives none (``ulimit -u``)."""
    here = scene("dcp", True)
    run = here.run(Fault("EAGAIN", at=1, kinds=("thread",), onwards=True))
    assert run.fired
    assert run.status == 1
    here.check(run)
    here.check_second_run()


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.thorough
def test_filesystem_without_mmap_converts(scene: Scenes, to: str) -> None:
    """Source and target alike; safetensors and `torch.load` would map both in the checks."""
    here = scene(to, False)
    run = here.run(Fault("ENODEV", at=1, kinds=("map",), onwards=True))
    assert run.fired, "nothing was mapped: there is no such fault any more"
    here.check(run)
    assert run.status == 0


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.thorough
def test_weights_lost_before_the_disk_fail_the_checks(scene: Scenes, to: str) -> None:
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
    assert len(weights) >= 4  # with several threads, some reads and writes are mixed
    for at in some_steps(weights, 1, random.Random(seed())):
        here.reset()
        run = here.run(replace(fault, at=weights[at - 1]))
        here.check(run)
        assert run.fired
        assert run.status == 1
        assert "error: check" in run.said


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.thorough
def test_target_is_fsynced_before_it_gets_its_name(scene: Scenes, to: str) -> None:
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


@pytest.mark.thorough
class TestRealDisks:
    """The same with disks that are truly full, read-only or broken; mounting needs root."""

    @pytest.fixture
    def disk(self, tmp_path: Path) -> Iterator[Path]:
        """A filesystem in memory that holds 4 MiB."""
        yield from mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=4m", "tmpfs")

    @pytest.mark.parametrize("with_old", [False, True], ids=["new", "over an old one"])
    @pytest.mark.parametrize("to", TARGETS)
    def test_every_size_of_a_disk(
        self, server: Server, disk: Path, to: str, with_old: bool
    ) -> None:
        """From one with no room for the weights to one with room for all, a page at a time.

        The weights' room is looked at before; what lies around them is what fails to fit.
        """
        here = Scene(server, disk / "root", tiny, ["--to", to, "--workers", "2"], with_old)
        if here.old:
            shutil.copytree(here.spare, here.target)
            shutil.rmtree(here.spare)
        states, page, used = [], 4096, shutil.disk_usage(disk).used
        step = page if repeats() > 1 else 6 * page
        for size in range(used + 60_000 // page * page, used + 250_000, step):
            subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)
            run = here.run()
            here.check(run)
            states.append(run.status)
            if run.status == 0:
                break
            assert here.found == here.old
            # What a run leaves for the next to take over would take room from it.
            shutil.rmtree(here.partial, ignore_errors=True)
            assert "ree some space" in run.said
        # Refused by the look at the free space; failed under way; done: in that order.
        assert states == sorted(states, reverse=True)
        assert set(states) == {2, 1, 0}

    @pytest.mark.parametrize("with_old", [False, True], ids=["new", "over an old one"])
    def test_a_disk_that_is_read_only(self, server: Server, disk: Path, with_old: bool) -> None:
        here = Scene(server, disk / "root", tiny, ["--to", "dcp"], with_old)
        if here.old:
            shutil.copytree(here.spare, here.target)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        run = here.run()
        here.check(run)
        assert run.status == 2
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        here.check_second_run()

    def test_a_shard_of_which_the_disk_gives_no_more(self, server: Server, tmp_path: Path) -> None:
        """The disk is a file that is cut while it is mounted: reads beyond its end are EIO."""
        source, image = tiny(tmp_path / "source"), tmp_path / "image"
        with open(image, "wb") as file:
            file.truncate(2 << 20)
        if not shutil.which("mkfs.ext2"):
            pytest.skip("NO SHARD WAS UNREADABLE: needs mkfs.ext2")
        subprocess.run(["mkfs.ext2", "-q", "-b", "1024", image], check=True)
        for folder in mounted(tmp_path / "whole", "-o", "loop", str(image)):
            # The shards last, so that they lie where the image is cut.
            for path in sorted(source.iterdir(), key=lambda path: path.suffix == ".safetensors"):
                shutil.copyfile(path, folder / path.name)
        for folder in mounted(tmp_path / "broken", "-o", "loop,ro", str(image)):
            shards = sorted(folder.glob("*.safetensors"))
            size = image.stat().st_size
            while not (broken := [shard for shard in shards if not readable(shard)]):
                size -= 4096
                os.truncate(image, size)
            run = server.run(["convert", folder, tmp_path / "target", "--quiet"], tmp_path)
            assert run.status == 1
            (line,) = run.said.splitlines()
            assert line.startswith(f"error: {broken[0]}: reading "), line
            assert line.endswith("Input/output error"), line
            assert not (tmp_path / "target").exists()

    @pytest.mark.parametrize("to", TARGETS)
    def test_every_limit_on_the_size_of_a_file(self, scene: Scenes, to: str) -> None:
        """RLIMIT_FSIZE: a write ends where the limit lies, and the next one fails (EFBIG)."""
        here = scene(to, True)
        longest = max(path.stat().st_size for path in here.spare.iterdir()) * 6 // 10
        # What the run says goes to a file, too, and has to fit.
        words = 1000
        for limit in some_steps(range(words, longest), 1, random.Random(seed())):
            here.reset()
            run = here.server.run(here.arguments, here.root, file_limit=words + limit)
            here.check(run)
            if run.status:
                assert "File too large" in run.said
                assert here.found == here.old


def mounted(folder: Path, *how: str) -> Iterator[Path]:
    folder.mkdir()
    done = subprocess.run(["mount", *how, str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"NO DISK WAS MADE TO FAIL: mount needs root ({done.stderr.strip()})")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def readable(path: Path) -> bool:
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            file.read()
        except OSError:
            return False
    return True


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny(tmp_path / "source")


class TestThreads:
    """What the threads return is compared with the plan, so that no failure is lost."""

    OPTIONS: ClassVar[dict[str, dict[str, Any]]] = {
        "dcp": {"shards": 3},
        "hf": {"max_shard_size": 20_000},
        "meta": {"shards": 2},
    }

    @pytest.mark.parametrize("how", ["vanishes", "fails", "leaves"])
    @pytest.mark.parametrize("to", TARGETS)
    def test_the_work_of_one_thread(
        self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, how: str
    ) -> None:
        plan = make_plan(open_checkpoint(source), Target(to=to, **self.OPTIONS[to]))  # type: ignore[arg-type]
        submit, jobs = ThreadPoolExecutor.submit, 0

        def failing(error: BaseException, *rest: Any) -> None:
            raise error

        def submits(self: ThreadPoolExecutor, work: Any, *rest: Any) -> Any:
            nonlocal jobs
            jobs += 1
            if jobs == 2:
                error = {"fails": ValueError("a bug"), "leaves": SystemExit(0)}.get(how)
                work = partial(failing, error) if error else lambda *rest: None
            return submit(self, work, *rest)

        monkeypatch.setattr(ThreadPoolExecutor, "submit", submits)
        expected = {"fails": ValueError, "leaves": SystemExit}.get(how, FailedError)
        with pytest.raises(expected):
            convert_checkpoint(plan, tmp_path / "target", workers=2, verified=False)
        assert jobs >= 2, "there are no such threads any more"
        assert not (tmp_path / "target").exists()


class TestASourceThatChanges:
    """Under the conversion, it is an error, and no target is a blend of before and after."""

    @pytest.mark.parametrize("step", ["write", "verify"])
    @pytest.mark.parametrize("how", ["longer", "shorter", "touched", "rewritten", "gone", "other"])
    def test_is_an_error(self, source: Path, tmp_path: Path, how: str, step: str) -> None:
        shard = source / "model-00002-of-00002.safetensors"
        done_to_it = 0

        def meddle(now: str, done: int, total: int) -> None:
            nonlocal done_to_it
            if now == step and not done_to_it and done > total // 3:
                done_to_it = 1
                change(shard, how)

        plan = make_plan(open_checkpoint(source), Target())
        if step == "verify" and how in ("touched", "other"):
            # The bytes are those that were read and written.
            convert_checkpoint(plan, tmp_path / "target", workers=1, progress=meddle)
            assert done_to_it
            return
        with pytest.raises(FailedError, match=rf"{shard.name}|check bits failed"):
            convert_checkpoint(plan, tmp_path / "target", workers=1, progress=meddle)
        assert done_to_it
        assert not (tmp_path / "target").exists()

    @pytest.mark.parametrize("to", TARGETS)
    def test_whose_size_and_time_are_as_before_fails_the_checks(
        self, source: Path, tmp_path: Path, to: str
    ) -> None:
        """Only the bytes tell; so without the checks (``--no-verify``) it is not noticed."""
        shard = source / "model-00002-of-00002.safetensors"
        done_to_it = 0

        def meddle(now: str, done: int, total: int) -> None:
            nonlocal done_to_it
            if not done_to_it and done > total // 3:
                done_to_it = 1
                before = shard.stat()
                change(shard, "rewritten")
                os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))

        plan = make_plan(open_checkpoint(source), Target(to=to))  # type: ignore[arg-type]
        with pytest.raises(FailedError, match="check bits failed"):
            convert_checkpoint(plan, tmp_path / "target", workers=1, progress=meddle)
        assert not (tmp_path / "target").exists()


def change(shard: Path, how: str) -> None:
    if how == "longer":
        with open(shard, "ab") as file:
            file.write(b"\0" * 64)
    elif how == "shorter":
        os.truncate(shard, shard.stat().st_size // 4)
    elif how == "touched":
        os.utime(shard, (1, 1))
    elif how == "rewritten":
        # Every element another one, the header as it is.
        data = bytearray(shard.read_bytes())
        start = 8 + int.from_bytes(data[:8], "little")
        data[start:] = bytes(byte ^ 1 for byte in data[start:])
        with open(shard, "r+b") as file:
            file.write(data)
    elif how == "gone":
        shard.unlink()
    else:
        # Another file under the name, as a download that is put in place does.
        shard.with_name("new").write_bytes(shard.read_bytes())
        os.rename(shard.with_name("new"), shard)
