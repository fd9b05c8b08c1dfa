"""A choice of all options for a conversion: its plan, its problems, its commands."""

from __future__ import annotations

import html
from dataclasses import dataclass, replace
from typing import Any

from llamaconv.checkpoint.checkpoint import Checkpoint
from llamaconv.convert.agreement import fingerprint
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
        try:
            check_target(
                parameters.target,
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
