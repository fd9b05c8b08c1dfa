"""What all commands share: messages on standard error, one JSON object on standard output."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from llamaconv.checkpoint.address import path_or_address
from llamaconv.checkpoint.hub_address import HubAddress
from llamaconv.checkpoint.store_address import StoreAddress
from llamaconv.report.errors import Problem, RefusedError, notes

FOLDER = "a folder, one file, or a run (its newest step is taken)"
OR_HUB = ", or a repository of the Hugging Face Hub, hf://ORG/NAME[@REVISION]"


def json_option(command: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int]) -> None:
    """Add ``--json`` to a command, and the function that runs it."""
    command.add_argument("--json", action="store_true", help="one JSON object on standard output")
    command.set_defaults(run=run)


def new_folder(text: str) -> Path:
    """Return the folder to write. Raises `RefusedError` for an address."""
    where = path_or_address(text, "Write to a local folder, then copy it there")
    if isinstance(where, HubAddress):
        raise RefusedError(f"{text}: nothing is written to the Hub. Name a folder")
    if isinstance(where, StoreAddress):
        raise RefusedError(
            f"{where}: nothing is written to a store yet. Write to a local folder, then copy it there"
        )
    return where


def say(problems: Iterable[Problem]) -> None:
    """Print one line per problem."""
    for problem in problems:
        print(problem, file=sys.stderr)


def say_notes(error: BaseException) -> None:
    """Print the notes of an error."""
    for note in notes(error):
        print(note, file=sys.stderr)


def print_json(content: dict[str, Any]) -> None:
    """Print the result of a command for programs."""
    print(json.dumps(content, indent=1))
