"""A choice of all options for a conversion: its plan, its problems, its commands."""

from __future__ import annotations

import html
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llamaconv.checkpoint.checkpoint import Checkpoint
from llamaconv.checkpoint.receipt import NAME
from llamaconv.checkpoint.store_address import StoreAddress
from llamaconv.checkpoint.store_errors import as_failures
from llamaconv.convert.agreement import fingerprint
from llamaconv.convert.store import Store
from llamaconv.convert.target_check import check_target
from llamaconv.notebook.parameters import Parameters
from llamaconv.notebook.words import Words
from llamaconv.plan.plan import Plan
from llamaconv.plan.planner import make_plan
from llamaconv.report.errors import Problem, RefusedError
from llamaconv.report.tables import size


@dataclass(frozen=True, repr=False)
class Chosen:
    """A choice of every option.

    Attributes:
        parameters: The options.
        plan: Their plan; None if the options make none.
        problems: The problems of the options, of the plan and of the target folder.
        status: What became of its conversion, as HTML; empty if there was none.
    """

    parameters: Parameters
    plan: Plan | None
    problems: tuple[Problem, ...]
    status: str = ""

    @property
    def errors(self) -> list[Problem]:
        """The problems that stop the conversion."""
        return [problem for problem in self.problems if problem.level == "error"]

    def __repr__(self) -> str:
        plan = [self.plan.summary()] if self.plan else []
        return "\n".join([*plan, *map(str, self.problems), self.parameters.headless()])

    def _repr_html_(self) -> str:
        parts = [RefusedError(self.problems)._repr_html_()] if self.problems else []
        if self.plan:
            parts.append(
                f"<p><b>{html.escape(self.plan.summary())}</b><br>{size(self.plan.bytes_to_read)} "
                f"to read, {size(self.plan.bytes_to_write)} to write</p>"
            )
        style = "border:1px solid #8886;padding:0.6em;white-space:pre-wrap;user-select:all"
        commands = html.escape(self.parameters.headless())
        parts.append(f'<p>The same without a notebook:</p><pre style="{style}">{commands}</pre>')
        return "\n".join([*parts, *([self.status] if self.status else [])])


def is_there(target: Path | StoreAddress, ask: bool = False) -> bool:
    """Return whether the target of a conversion still exists.

    Args:
        target: The folder, or its address.
        ask: Whether to ask a store, too; else it is taken to keep what it got.

    Raises:
        FailedError: A store cannot be asked.
    """
    if isinstance(target, Path):
        return (target / NAME).is_file()
    if not ask:
        return True
    with as_failures(target, target):
        return NAME in Store(target).listed()


def choose(checkpoint: Checkpoint, parameters: Parameters, **changes: Any) -> Chosen:
    """Plan a conversion of ``checkpoint``; never raises.

    Args:
        checkpoint: The source.
        parameters: The options.
        changes: Options that replace those of ``parameters``.
    """
    if (shards := str(changes.get("shards", ""))).isdecimal() and len(shards) < 10:
        # A text field gives text. Text that is not a number is refused like any other value.
        changes["shards"] = int(shards)
    parameters = parameters.changed(**changes)
    plan, problems = None, parameters.problems()
    if not problems:
        plan = make_plan(checkpoint, parameters.options())
        problems += plan.problems
        target = parameters.destination
        if isinstance(target, StoreAddress):
            # What is in the store is asked when it is converted, not with every change of a control.
            return Chosen(parameters, plan, tuple(problems))
        try:
            check_target(
                target,
                checkpoint.path,
                plan.bytes_to_write,
                parameters.may_replace,
                fingerprint(plan),
            )
        except RefusedError as error:
            problems += error.problems
    return Chosen(parameters, plan, tuple(problems))


def in_words(chosen: Chosen, words: Words) -> Chosen:
    """Return ``chosen`` with its problems in the words of the place."""
    return replace(chosen, problems=tuple(map(words.problem, chosen.problems)))
