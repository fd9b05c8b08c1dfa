"""Several conversions to one target, and readers of a target that is being replaced.

What is promised: of conversions at once to one target, those that win run one after the other,
and the others are refused (status 2) with a clear message. Under the target's name stands a
whole target of one of them at every moment.

A reader that opens the folder once (by a descriptor, or as its working folder) sees one target,
or finds a file gone when that target has been replaced. A reader that opens file after file by the
target's *path* may get files of both: names cannot be held. So what matters is that it notices:
the digests in the receipt (``llamaconv verify TARGET``) say so, and plain ``dcp.load`` does not.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.faults import (
    KINDS,
    PARTIAL,
    Fault,
    Run,
    Scene,
    Server,
    content,
    repeats,
    seed,
    some_steps,
    tiny,
)

from llamaconv import verify_checkpoint
from llamaconv.report.errors import LlamaconvError

pytestmark = pytest.mark.thorough

REFUSALS = ("another conversion is writing", "has just ended", "exists already")
FIRST = Fault("stop", at=1)
# The other conversion, by what it writes: the same names of files, other bytes.
OTHER = ["--dtype", "float32"]

Scenes = Callable[[bool], Scene]


@pytest.fixture(scope="module")
def scene(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Scenes:
    """A scene without or with an old target; ``other`` is what a run with `OTHER` writes."""
    folder = tmp_path_factory.mktemp("concurrency")
    made: dict[bool, Scene] = {}

    def get(with_old: bool) -> Scene:
        if with_old not in made:
            options = ["--to", "dcp", "--shards", "3", "--workers", "1"]
            here = Scene(server, folder / f"{with_old}", tiny, options, with_old)
            here.reset()
            assert server.run([*here.arguments, *OTHER], here.root).status == 0
            here.others = [content(here.target)]
            made[with_old] = here
        made[with_old].reset()
        return made[with_old]

    return get


def go_on(process: int) -> None:
    os.kill(process, signal.SIGCONT)


def check_refused(run: Run) -> None:
    assert run.status == 2, f"status {run.status}: {run.said}"
    (line,) = run.said.splitlines()
    assert line.startswith("error: ")
    assert any(refusal in line for refusal in REFUSALS), line


@pytest.mark.parametrize("with_old", [False, True], ids=["new", "over an old one"])
@pytest.mark.parametrize("number", [2, 5])
def test_concurrent_conversions_leave_one_valid_target(
    scene: Scenes, number: int, with_old: bool
) -> None:
    """All stand at their first call to the system, and are let go within a millisecond."""
    here, chance = scene(with_old), random.Random(seed())
    for _ in range(int(min(200, 2 * repeats()))):
        here.reset()
        processes = [here.start(FIRST, OTHER if n % 2 else ()) for n in range(number)]
        for process in processes:
            assert here.server.wait(process).status is None
        chance.shuffle(processes)
        for process in processes:
            go_on(process)
            time.sleep(chance.choice([0, 0, 0.001, 0.03]))
        runs = [here.server.wait(process) for process in processes]
        won = [run for run in runs if run.status == 0]
        for run in runs:
            if run.status:
                check_refused(run)
        assert won
        assert with_old or len(won) == 1, "one wrote over the other unasked"
        names = {path.name for path in here.root.iterdir()}
        assert names - {"target-train"} == {"source", "target"}
        assert content(here.target) in [here.new, *here.others]


@pytest.mark.parametrize(
    ("with_old", "after"),
    [
        pytest.param(False, False, id="new"),
        pytest.param(True, False, id="over an old one"),
        pytest.param(True, True, id="old one being removed"),
    ],
)
def test_conversion_paused_at_a_step_does_not_break_another(
    scene: Scenes, with_old: bool, after: bool
) -> None:
    """At every call that concerns the target: the other runs from begin to end in between.

    ``after`` chooses the steps after the target took its name, otherwise those up to it.
    """
    here = scene(with_old)
    steps = here.steps(KINDS, only="/target")
    (placed,) = (
        n
        for n, call in enumerate(steps, 1)
        if call.startswith("rename") and call.endswith("/target")
    )
    first, last = (placed, len(steps)) if after else (0, placed)
    chosen = {first + n for n in some_steps(steps[first:last], 3, random.Random(seed()))}
    # Where two are most likely to meet, always; but for one step, which has a test of its own.
    meets = [n for n, call in enumerate(steps, 1) if call.split(" ")[0] in ("mkdir", "flock")]
    chosen |= {n for n in meets if first < n <= last}
    chosen.discard(step_of_opening(steps))
    wrong = []
    for at in sorted(chosen):
        if reason := meeting(here, at, with_old):
            wrong.append(reason)
    print(f"{len(chosen)} of {last - first} steps")
    assert not wrong, f"{len(wrong)} of {len(chosen)} steps:\n" + "\n".join(wrong)


def test_conversion_paused_before_opening_its_folder_does_not_break_another(scene: Scenes) -> None:
    here = scene(False)
    assert not meeting(here, step_of_opening(here.steps(KINDS, only="/target")), False)


def step_of_opening(steps: list[str]) -> int:
    return next(
        n for n, call in enumerate(steps, 1) if call.startswith("open") and call.endswith(PARTIAL)
    )


def meeting(here: Scene, at: int, with_old: bool) -> str:
    """One stops before its step ``at``, another runs, the first goes on: what was wrong, if any."""
    here.reset()
    process = here.start(Fault("stop", at, only="/target"))
    assert here.server.wait(process).status is None
    other = here.server.run([*here.arguments, *OTHER], here.root)
    go_on(process)
    one = here.server.wait(process)
    won = (one.status, other.status).count(0)
    try:
        here.check_folders()
        assert here.found in [here.new, *here.others], "no whole target"
        left = list(here.partial.iterdir()) if here.partial.exists() else []
        assert not left, "a partial folder is left, with files"
        assert won, "both were refused"
        assert with_old or won == 1, "one wrote over the other unasked"
        for run in (one, other):
            if run.status:
                check_refused(run)
    except AssertionError as error:
        call = one.fired[0].replace(str(here.root), "")
        reason = str(error).split("\n", 1)[0]
        return f"{at} ({call}), {one.status} and {other.status}: {reason}"
    return ""


def test_target_of_a_running_conversion_is_refused(scene: Scenes) -> None:
    here = scene(True)
    process = here.start(Fault("stop", at=20, kinds=("write",), only=".distcp"))
    stopped = here.server.wait(process)
    assert stopped.status is None
    began = content(here.partial)
    check_refused(here.run())
    assert content(here.partial) == began, "the other's folder was touched"
    assert content(here.target) == here.old
    go_on(process)
    run = here.server.wait(process)
    here.check(run)
    assert run.status == 0
    assert not here.partial.exists()


class TestWhatStandsInThePlaceOfThePartialFolder:
    """``TARGET.llamaconv-partial`` is there already."""

    def test_what_a_dead_process_left(self, scene: Scenes) -> None:
        here = scene(True)
        (here.partial / "folder").mkdir(parents=True)
        (here.partial / "folder" / "file").write_text("left")
        (here.partial / "__0_0.distcp").write_bytes(b"half of it")
        (here.partial / "llamaconv.json").write_text("{")
        os.symlink(here.source, here.partial / "link")
        here.check(here.run())
        assert here.found == here.new
        assert not here.partial.exists()

    def test_a_file(self, scene: Scenes) -> None:
        here = scene(True)
        here.partial.write_text("precious")
        try:
            run = here.run()
            here.check(run)
            assert run.status in (1, 2)
            assert here.partial.name in run.said
            assert here.partial.read_text() == "precious"
        finally:
            here.partial.unlink()

    @pytest.mark.parametrize("to", ["a folder", "nothing"])
    def test_a_link(self, scene: Scenes, tmp_path: Path, to: str) -> None:
        """Another's folder must not be emptied, nor the link take the target's name."""
        here = scene(True)
        mine = tmp_path / "mine"
        if to == "a folder":
            mine.mkdir()
            (mine / "file").write_text("precious")
        here.partial.symlink_to(mine)
        try:
            run = here.run()
            assert not mine.exists() or (mine / "file").read_text() == "precious"
            here.check(run)
            assert run.status in (1, 2)
            assert here.partial.name in run.said
        finally:
            here.partial.unlink(missing_ok=True)
            if here.target.is_symlink():
                here.target.unlink()


class TestReaders:
    def test_one_that_holds_the_folder_sees_one_target(self, scene: Scenes) -> None:
        """While the target is replaced over and over by two conversions in turn."""
        here = scene(True)
        ends = time.monotonic() + min(repeats(), 60)
        complete, gone, number = 0, 0, 0
        process = here.start()
        while time.monotonic() < ends:
            folder = os.open(here.target, os.O_RDONLY)
            try:
                found = verify_checkpoint(f"/proc/self/fd/{folder}")
                if found.ok:
                    complete += 1
                else:
                    # Only a file that went with the folder, never one with other bytes.
                    said = " ".join(problem.message for problem in found.problems)
                    assert "have changed" not in said, said
                    gone += 1
            except (LlamaconvError, OSError):
                gone += 1
            finally:
                os.close(folder)
            if finished(process):
                assert here.server.wait(process).status == 0
                number += 1
                process = here.start(more=OTHER if number % 2 else ())
        assert here.server.wait(process).status == 0
        print(f"{complete} complete reads and {gone} gone, over {number} replacements")
        assert complete
        assert number > 1

    def test_one_that_goes_by_the_path_is_told_of_a_mixture(self, scene: Scenes) -> None:
        """Its first file is of one target, its second of the next."""
        here = scene(True)
        shutil.rmtree(here.target)
        assert here.run().status == 0
        replaced = []

        def replace_it(step: str, done: int, total: int) -> None:
            # Once a piece was read: the first file is open, the others are not.
            if not replaced:
                arguments = [*here.arguments, "--rope", "half_split"]
                replaced.append(here.server.run(arguments, here.root).status)

        found = verify_checkpoint(here.target, progress=replace_it)
        assert replaced == [0]
        assert not found.ok
        assert "have changed" in found.problems[0].message
        assert verify_checkpoint(here.target).ok

    def test_one_that_goes_by_the_path_over_and_over(self, scene: Scenes) -> None:
        """Whatever it gets: what passes is the receipt's own bytes, and the receipt is whole."""
        here = scene(True)
        ends = time.monotonic() + min(repeats(), 60)
        outcomes: dict[str, int] = {}
        number = 0
        process = here.start()
        while time.monotonic() < ends:
            try:
                outcome = "complete" if verify_checkpoint(here.target).ok else "told of a mixture"
            except (LlamaconvError, OSError):
                outcome = "told that files are gone"
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
            # On Linux two names are exchanged at once: the target is never away.
            assert here.target.is_dir()
            if finished(process):
                assert here.server.wait(process).status == 0
                number += 1
                process = here.start(more=OTHER if number % 2 else ())
        assert here.server.wait(process).status == 0
        print(f"{outcomes} over {number} replacements")
        assert outcomes.get("complete")


def finished(process: int) -> bool:
    """Whether a run has ended; nobody has waited for it yet."""
    state = Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0]
    return state == "Z"
