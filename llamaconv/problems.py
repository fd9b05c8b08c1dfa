"""What is said when something is wrong: values for problems, and two exceptions.

A problem is one line that names the file or tensor, what was expected and what was found,
the likely cause and the way out. A plan collects all of them before anything is refused.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        message: The file or tensor, what was expected and found, the likely cause, the remedy.
        names: Every tensor or file concerned.
        level: Whether it stops a conversion.
        is_inherent: The format itself cannot say what is missing, so that every file of the format
            has the problem, those that llamaconv writes too.
    """

    message: str
    names: tuple[str, ...] = ()
    level: Literal["error", "warning"] = "error"
    is_inherent: bool = False

    def __str__(self) -> str:
        return f"{self.level}: {shortened(printable(self.message), 8000)}"


def warning(message: str, names: Iterable[str] = ()) -> Problem:
    return Problem(message, tuple(names), "warning")


INTERRUPTED = "interrupted; nothing half-written stands under the target's name"


class LlamaconvError(Exception):
    """Base of both; ``problems`` holds what `str` shows a line each.

    ``status`` is the command line's exit status for it.
    """

    status = 1

    def __init__(self, problems: Problem | str | Iterable[Problem]) -> None:
        if isinstance(problems, str):
            problems = Problem(problems)
        if isinstance(problems, Problem):
            problems = (problems,)
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows: the problems, without a traceback (a hook of IPython)."""
        return [*map(str, self.problems), *notes(self)]

    def _repr_html_(self) -> str:
        said = [*map(str, self.problems), *notes(self)]
        lines = (f"<li>{html.escape(line)}</li>" for line in said)
        style = "border-left:4px solid #c44;padding-left:1em;list-style:none"
        return f'<ul role="alert" style="{style}">{"".join(lines)}</ul>'


class RefusedError(LlamaconvError):
    """The request or the input is refused; nothing was written. Exit status 2."""

    status = 2


class FailedError(LlamaconvError):
    """The work was begun and the machine or a check failed; the target is as it was. Status 1."""


class UnusableError(FailedError):
    """The same, and what was written is of no use to another run either."""


def notes(error: BaseException) -> list[str]:
    """What was added to ``error`` on its way: a line each."""
    return [f"note: {printable(note)}" for note in getattr(error, "__notes__", ())]


def printable(text: str) -> str:
    """``text`` with what a terminal would act on (escapes, newlines) written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shortened(text: str, most: int = 1000) -> str:
    """``text`` without its middle where it is longer than anything worth reading."""
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]} … {len(text) - 2 * half:,} characters … {text[-half:]}"


def some(names: Iterable[str], most: int = 6) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def or_problems(read: Callable[[], T], problems: list[Problem]) -> T | None:
    """What ``read`` returns; its refusal is added to ``problems`` instead of raised, for None."""
    try:
        return read()
    except RefusedError as error:
        problems.extend(error.problems)
        return None
