"""A conversion is killed, or interrupted, at a moment chosen at random: true signals, true sizes.

`test_faults` kills at every call to the system; here the moment falls where the time is spent,
in writing, in syncing and in the checks, with several threads. The ordinary run takes a few
moments, one from each equal part of an undisturbed run; ``LLAMACONV_FAULTS=all`` takes 50 for
each format. ``LLAMACONV_SEED`` repeats them.

Only what holds in the end is tested, so a second run may begin anew or take over what it finds.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import checkpoints
from support.faults import Run, Scene, Server, repeats, seed

from llamaconv.model.params import LlamaParams

pytestmark = pytest.mark.thorough

# 75 MB of bf16, of which no file has all.
PARAMS = LlamaParams(512, 4, 8, 2, 64, 1024, 28_000, 1e-5, 1e4)
OPTIONS = {
    "dcp": ["--to", "dcp", "--shards", "3"],
    "hf": ["--to", "hf", "--max-shard-size", "20MB"],
    "meta": ["--to", "meta", "--shards", "2"],
}
MOMENTS = 50


@pytest.fixture(scope="module")
def large(
    server: Server, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, bool], tuple[Scene, float]]:
    """A scene by format and with or without an old target, and the seconds of a run."""
    made: dict[tuple[str, bool], tuple[Scene, float]] = {}
    folder = tmp_path_factory.mktemp("large")
    weights = checkpoints.write_model(folder / "weights", PARAMS, shards=3)

    def source(place: Path) -> Path:
        return Path(shutil.copytree(weights, place, copy_function=os.link))

    def get(to: str, with_old: bool) -> tuple[Scene, float]:
        if (to, with_old) not in made:
            options = [*OPTIONS[to], "--workers", "2"]
            here = Scene(server, folder / f"{to}-{with_old}", source, options, with_old)
            here.reset()
            began = time.monotonic()
            assert here.run().status == 0
            made[to, with_old] = here, time.monotonic() - began
        return made[to, with_old]

    return get


def moments(ordinary: int, seconds: float) -> Iterator[float]:
    """Seconds after the start, one at random from each equal part of a run."""
    number = ordinary if repeats() == 1 else int(min(MOMENTS, ordinary * repeats()))
    chance = random.Random(seed())
    for part in range(number):
        yield seconds * (part + chance.random()) / number


def hit(here: Scene, after: float, *signals: signal.Signals) -> Run:
    """A run that gets ``signals`` when ``after`` seconds have gone; prints where that was.

    Earlier where the run had ended by then, as it may on a machine that has other work too.
    """
    for _ in range(8):
        here.reset()
        process = here.start()
        time.sleep(after)
        # Nobody waits for the process yet, so its number is still its own.
        for number in signals:
            os.kill(process, number)
            time.sleep(0.002)
        there = here.partial if here.partial.exists() else here.target
        stood = (
            f"{len(list(there.iterdir()))} files in {there.name}" if there.exists() else "nothing"
        )
        run = here.server.wait(process)
        print(f"after {after:.3f} s: {stood}; status {run.status}")
        if run.status != 0:
            return run
        here.check(run)
        after /= 2
    raise AssertionError("no run was hit")


@pytest.mark.parametrize(
    ("to", "with_old", "ordinary"),
    [("dcp", False, 2), ("dcp", True, 2), ("hf", True, 1), ("meta", True, 1)],
)
def test_killed(
    large: Callable[[str, bool], tuple[Scene, float]], to: str, with_old: bool, ordinary: int
) -> None:
    here, seconds = large(to, with_old)
    for after in moments(ordinary, seconds):
        run = hit(here, after, signal.SIGKILL)
        assert run.status == -signal.SIGKILL
        here.check(run)
        here.check_second_run()


@pytest.mark.parametrize(
    ("signals", "ordinary"),
    [
        ([signal.SIGINT], 1),
        ([signal.SIGTERM], 1),
        ([signal.SIGINT, signal.SIGINT, signal.SIGTERM], 1),
    ],
    ids=["SIGINT", "SIGTERM", "one after the other"],
)
def test_interrupted(
    large: Callable[[str, bool], tuple[Scene, float]], signals: list[signal.Signals], ordinary: int
) -> None:
    here, seconds = large("dcp", True)
    for after in moments(ordinary, seconds):
        # Before the command line has begun, a signal does what it does to every process; on a busy
        # machine it begins later.
        after = max(after, 0.05)
        run = hit(here, after, *signals)
        while run.status in (-signal.SIGINT, -signal.SIGTERM) and not run.said and after < seconds:
            after *= 2
            run = hit(here, after, *signals)
        assert run.status == 130, run.said
        assert "interrupted" in run.said
        here.check(run)
        here.check_second_run()
