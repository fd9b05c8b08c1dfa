"""Problems and exceptions: how errors are reported.

A problem is one line: the file or tensor, what is wrong, and what to do. A plan collects all of
them before anything is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, TypeVar

from llamaconv.report.boxes import box

T = TypeVar("T")


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        message: The file or tensor, what is wrong, the likely cause, and the remedy.
        names: Every tensor or file concerned.
        level: Whether it stops a conversion.
        is_inherent: The format itself cannot state what is missing, so that every file of the
            format has the problem, those that llamaconv writes too.
        explains_missing: Tensors that it does not name may be lost with it: which of them are
            missing is not reported again.
    """

    message: str
    names: tuple[str, ...] = ()
    level: Literal["error", "warning"] = "error"
    is_inherent: bool = False
    explains_missing: bool = False

    def __str__(self) -> str:
        return f"{self.level}: {shortened(printable(self.message), 8000)}"


def explained(problems: Iterable[Problem]) -> set[str]:
    """Return the names that errors name: what else is wrong with these follows from it."""
    return {name for one in problems if one.level == "error" for name in one.names}


def warning(message: str, names: Iterable[str] = ()) -> Problem:
    """Return a problem that does not stop a conversion."""
    return Problem(message, tuple(names), "warning")


INTERRUPTED = "interrupted; the target was not changed"


class LlamaconvError(Exception):
    """Base of all errors that llamaconv raises.

    Attributes:
        problems: What is wrong; ``str`` shows one line for each.
        status: The exit status of the command line.
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
        """Return what a notebook shows: the problems, no traceback (a hook of IPython)."""
        return [*map(str, self.problems), *notes(self)]

    def _repr_html_(self) -> str:
        errors = [str(one) for one in self.problems if one.level == "error"]
        warnings = [str(one) for one in self.problems if one.level == "warning"]
        parts = [box("error", [*errors, *notes(self)])] if errors or not warnings else []
        return "\n".join([*parts, *([box("warning", warnings)] if warnings else [])])


class RefusedError(LlamaconvError):
    """The request or the input is refused; nothing was written. Exit status 2."""

    status = 2


class FailedError(LlamaconvError):
    """The machine or a check failed during the work; the target is unchanged. Exit status 1."""


STOPPED = "stopped, another thread failed"
"""What a thread raises that ends only because another one failed, whose error is reported."""


class UnusableError(FailedError):
    """The same, and no later run can reuse what was written."""


def notes(error: BaseException) -> list[str]:
    """Return one line for each note that was added to ``error``."""
    return [f"note: {printable(note)}" for note in getattr(error, "__notes__", ())]


def printable(text: str) -> str:
    """Return ``text`` with control characters (terminal escapes, newlines) written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shortened(text: str, most: int = 1000) -> str:
    """Return ``text``, without its middle if it has more than ``most`` characters."""
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]} … {len(text) - 2 * half:,} characters … {text[-half:]}"


def first_few(names: Iterable[str], most: int = 6) -> str:
    """Return the first ``most`` names as text, and how many more there are."""
    names = list(names)
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def collect_problems(read: Callable[[], T], problems: list[Problem]) -> T | None:
    """Return what ``read`` returns; if it refuses, return None and add to ``problems``."""
    try:
        return read()
    except RefusedError as error:
        problems.extend(error.problems)
        return None
