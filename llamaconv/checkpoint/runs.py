"""The steps of a training run, in the folder that its trainer saves them to."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from llamaconv.report.errors import Problem, first_few, warning

# step-1000 (TorchTitan), checkpoint-500 (transformers), epoch_3 (torchtune), global_step200
_STEP = re.compile(r"([A-Za-z_]+)[-_]?(\d+)")
# Names that nothing but a step has, so that the newest of them is what is meant by the folder around.
_ONLY_STEPS = re.compile(r"(?:global[-_]?)?(?:step|checkpoint|epoch)[-_]?")
# torch_checkpointing saves to tmp_step-1000, and gives it its name when all ranks are done.
_UNFINISHED = re.compile(r"tmp_.+")
FOLDER = "checkpoint"
"""Where TorchTitan saves, in the folder of a run."""


@dataclass(frozen=True)
class Steps:
    """What a folder of steps contains.

    Attributes:
        folder: The folder.
        complete: The folders of steps with a checkpoint, by number.
        incomplete: Those that have none, or are still written.
        others: Other folders with a checkpoint.
    """

    folder: Path
    complete: tuple[Path, ...]
    incomplete: tuple[Path, ...]
    others: tuple[Path, ...]

    @property
    def newest(self) -> Path | None:
        """The step that is meant by the folder; None if its names leave that open."""
        stems = {match[1] for step in self.complete if (match := _STEP.fullmatch(step.name))}
        if len(stems) != 1 or not _ONLY_STEPS.fullmatch(stems.pop()):
            return None
        return self.complete[-1]

    def skipped(self) -> list[Problem]:
        """Return a warning for each folder that is left out."""
        unfinished = "not a complete checkpoint; the training may still be writing it"
        unnamed = "its name does not end in the number of a step"
        return [
            warning(f"{folder}: skipped, {reason}")
            for folders, reason in ((self.incomplete, unfinished), (self.others, unnamed))
            for folder in folders
        ]


def steps_of(run: Path, is_checkpoint: Callable[[Path], bool]) -> Steps:
    """Return the steps in the folder ``run``, or in its folder ``checkpoint``."""
    found = _steps_in(run, is_checkpoint)
    if not found.complete and (run / FOLDER).is_dir() and not is_checkpoint(run / FOLDER):
        return _steps_in(run / FOLDER, is_checkpoint)
    return found


def names_of_steps(names: Iterable[str]) -> list[str]:
    """Return the names that nothing but a step has, the newest first."""
    found = [(match, name) for name in names if (match := _STEP.fullmatch(name))]
    steps = [(int(match[2]), name) for match, name in found if _ONLY_STEPS.fullmatch(match[1])]
    return [name for _, name in sorted(steps, reverse=True)]


def newest_taken(run: Path, steps: Steps) -> Problem:
    """Return what to say of a run whose newest step is opened."""
    assert steps.newest is not None
    text = f"{run}: a run of {len(steps.complete)} steps; the newest is taken, {steps.newest}"
    if len(steps.complete) == 1:
        text = f"{run}: a run; its step is taken, {steps.newest}"
    if left := [folder.name for folder in (*steps.incomplete, *steps.others)]:
        text += f"; not a complete step: {first_few(left, 3)}"
    return warning(f"{text}. convert --every-step takes each")


def _steps_in(folder: Path, is_checkpoint: Callable[[Path], bool]) -> Steps:
    numbers: dict[Path, int] = {}
    incomplete, others = [], []
    for inside in sorted(entry for entry in folder.iterdir() if entry.is_dir()):
        match = _STEP.fullmatch(inside.name)
        if _UNFINISHED.fullmatch(inside.name) or (match and not is_checkpoint(inside)):
            incomplete += [inside] if match else []
        elif match:
            numbers[inside] = int(match[2])
        elif is_checkpoint(inside):
            others.append(inside)
    complete = sorted(numbers, key=lambda inside: (numbers[inside], inside.name))
    return Steps(folder, tuple(complete), tuple(incomplete), tuple(others))
