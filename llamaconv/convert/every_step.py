"""Plan the conversion of every step of a training run: one folder per step, the oldest first.

A later run with the same options skips the steps whose receipt shows that they were converted, so a
scheduled job can call it again while the training goes on.

Limit: whether a step was saved again after its conversion is seen from the time and the sizes of its
files. A file server whose clock is behind can hide it; --overwrite converts all steps again.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llamaconv.checkpoint import receipt
from llamaconv.checkpoint.open import looks_like_checkpoint, open_checkpoint
from llamaconv.checkpoint.runs import steps_of
from llamaconv.convert.agreement import fingerprint
from llamaconv.convert.convert import Conversion
from llamaconv.convert.make_receipt import source_record, target_record
from llamaconv.convert.target_check import check_existing, check_target
from llamaconv.model.names import GENERATIONS
from llamaconv.plan.plan import Plan
from llamaconv.plan.planner import make_plan
from llamaconv.plan.target import Target
from llamaconv.report.errors import Problem, RefusedError, first_few


@dataclass(frozen=True)
class Step:
    """One step of a run.

    Attributes:
        plan: The plan of its conversion.
        target: The folder to write.
        is_done: Whether an earlier run with the same options wrote it.
    """

    plan: Plan
    target: Path
    is_done: bool


def plan_every_step(
    run: Path, target: Path, options: Target, *, overwrite: bool = False, verified: bool = True
) -> tuple[list[Step], list[Problem]]:
    """Plan all steps before the first one is written.

    Args:
        run: The folder that contains the folders of the steps, or the folder around that one.
        target: The folder for the converted steps, which keep their names.
        options: The options of each conversion.
        overwrite: Convert steps again that exist in ``target``.
        verified: Whether the conversions will be checked; if so, only checked ones are skipped.

    Returns:
        The steps by number, and a warning for each folder that is skipped.

    Raises:
        RefusedError: There are no steps or of several generations, a plan has errors, a target must not or cannot be
            written, or the free space is too small for all.
    """
    folders, skipped = find_steps(run)
    steps = []
    for folder in folders:
        plan = make_plan(open_checkpoint(folder), options)
        plan.raise_for_errors()
        there = target / folder.name
        is_done = not overwrite and _is_converted(plan, there, verified)
        if not is_done:
            check_existing(there, overwrite)
        steps.append(Step(plan, there, is_done))
    _refuse_mixed(run, steps)
    left = [step for step in steps if not step.is_done]
    needed = sum(step.plan.bytes_to_write for step in left)
    for step in left:
        plan = step.plan
        check_target(step.target, plan.source.local_path, needed, overwrite, fingerprint(plan))
    return steps, skipped


def _refuse_mixed(run: Path, steps: Sequence[Step]) -> None:
    """Raise `RefusedError` if steps of several TorchTitan generations are in one run."""
    by_generation: dict[str, list[str]] = {}
    for step in steps:
        if step.plan.source.generation in GENERATIONS:
            found = by_generation.setdefault(step.plan.source.generation, [])
            found.append(step.plan.source.folder.name)
    if len(by_generation) > 1:
        text = "; ".join(
            f"{generation} in {first_few(names, 3)}" for generation, names in by_generation.items()
        )
        raise RefusedError(
            f"{run}: its steps have the names of several generations: {text}. Move those of one "
            "generation to another folder, and convert the two runs one by one"
        )


def find_steps(run: Path) -> tuple[list[Path], list[Problem]]:
    """Return the folders of the steps in ``run``, by number, and a warning for each other one.

    Raises:
        RefusedError: There are no steps in it.
    """
    if not run.is_dir():
        raise RefusedError(f"{run}: {'not a folder' if run.exists() else 'not found'}")
    found = steps_of(run, looks_like_checkpoint)
    skipped = found.skipped()
    if not found.complete:
        if looks_like_checkpoint(run):
            reason = "a single checkpoint, without folders of steps. Leave out --every-step"
            raise RefusedError(f"{run}: {reason}")
        count = f" ({len(skipped)} incomplete or without a number)" if skipped else ""
        raise RefusedError(
            f"{run}: no complete folders of steps such as step-1000{count}. Give the folder around "
            "them"
        )
    return list(found.complete), skipped


def warnings_of(steps: Sequence[Step]) -> list[Problem]:
    """Return the warnings of all plans; one that many steps have appears once, with the count."""
    first: dict[str, Problem] = {}
    count: dict[str, int] = {}
    for step in steps:
        for problem in step.plan.problems:
            if problem.level == "warning":
                key = problem.message.replace(str(step.plan.source.path), "")
                first.setdefault(key, problem)
                count[key] = count.get(key, 0) + 1
    return [
        problem
        if count[key] == 1
        else replace(problem, message=f"{problem.message} (in {count[key]} steps)")
        for key, problem in first.items()
    ]


def run_to_json(
    target: Path, steps: Sequence[Step], done: Mapping[str, Conversion]
) -> dict[str, Any]:
    """Return the conversion of a run as ``llamaconv convert --every-step --json`` prints it.

    Args:
        target: The folder of the converted steps.
        steps: All steps.
        done: What was converted now, by the name of the step's folder.

    Returns:
        ``ok``, ``target``; the sums ``bytes_read``, ``bytes_written``, ``bytes_reused`` and
        ``seconds``; ``verified``; ``next`` of the newest step, if one was converted; and
        ``steps``, each with the entries of `Conversion.to_json`, or ``target`` and ``skipped``.
    """
    found = {name: conversion.to_json() for name, conversion in done.items()}
    sums = ("bytes_read", "bytes_written", "bytes_reused", "seconds")
    last = [*found.values()][-1:]
    return {
        "ok": all(one["ok"] for one in found.values()),
        "target": str(target),
        **{name: sum(one[name] for one in found.values()) for name in sums},
        "verified": all(one["verified"] for one in found.values()),
        "next": last[0]["next"] if last else "",
        "steps": [
            found.get(step.target.name, {"target": str(step.target), "skipped": True})
            for step in steps
        ],
    }


def _is_converted(plan: Plan, target: Path, verified: bool) -> bool:
    """Return whether the receipt in ``target`` is that of this conversion, and still current."""
    try:
        found = receipt.read(target)
    except RefusedError:
        return False
    if found is None or (verified and not (found.verified and found.verified.ok)):
        return False
    # The training may have been restarted: a step that was saved again is younger than its receipt.
    try:
        created = datetime.datetime.fromisoformat(found.created).timestamp()
    except ValueError:
        return False
    is_older = all(file.stat().st_mtime <= created for file in plan.source.local_files)
    same = found.source == source_record(plan) and found.target == target_record(plan)
    return is_older and same and found.params == plan.params
