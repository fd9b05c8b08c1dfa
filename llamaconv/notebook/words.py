"""Options in the words of the place: messages are written for the command line.

In a panel an option is a control, and in a notebook without controls a parameter of papermill.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace

from llamaconv.plan.target import CHOICES
from llamaconv.report.errors import LlamaconvError, Problem, notes

_OPTION = re.compile(r"(pass )?--([a-z][a-z0-9-]*)(?: ([a-z0-9._]+))?")


class Words:
    """How options are called in one place.

    Attributes:
        names: The options that the place has, by the names of parameters.
        controls: Whether they are controls.
    """

    def __init__(self, names: Collection[str], controls: bool) -> None:
        self.names = names
        self.controls = controls

    def text(self, text: str) -> str:
        """Return ``text`` with the options that the place has in its words."""
        if self.controls:
            text = text.replace("the same command continues", "Convert continues")
        else:
            text = text.replace("the same command continues", "the same run continues")
        return _OPTION.sub(self._option, text)

    def _option(self, found: re.Match[str]) -> str:
        verb, name, value = found[1] or "", found[2].replace("-", "_"), found[3]
        if name not in self.names:
            return found[0]
        rest = f" {value}" if value else ""
        if name == "overwrite":
            if not verb:
                return f"overwrite{rest}"
            return f"tick overwrite{rest}" if self.controls else f"pass -p overwrite True{rest}"
        is_value = value in CHOICES.get(name, ())
        if self.controls:
            return f"{verb}{name}{' = ' if is_value else ' '}{value}" if value else f"{verb}{name}"
        return f"{verb}-p {name}{rest}"

    def problem(self, problem: Problem) -> Problem:
        """Return ``problem`` in the words of the place."""
        return replace(problem, message=self.text(problem.message))

    def error(self, error: LlamaconvError) -> LlamaconvError:
        """Return ``error`` in the words of the place, with its notes."""
        said = type(error)(map(self.problem, error.problems))
        for note in notes(error):
            said.add_note(self.text(note.removeprefix("note: ")))
        return said
