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
OR_REMOTE = (
    ", or a repository of the Hugging Face Hub, hf://ORG/NAME[@REVISION], or a folder of a store, "
    "s3://BUCKET/FOLDER (also gs://, az:// and what else fsspec has a driver for)"
)


def json_option(command: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int]) -> None:
    """Add ``--json`` to a command, and the function that runs it."""
    command.add_argument("--json", action="store_true", help="one JSON object on standard output")
    command.set_defaults(run=run)


_WRITE_HERE = "Write to a local folder, then copy it there"


def new_target(text: str) -> Path | StoreAddress:
    """Return the folder to write, or its address in a store. Raises `RefusedError` for others."""
    where = path_or_address(text, _WRITE_HERE)
    if isinstance(where, HubAddress):
        raise RefusedError(f"{text}: nothing is written to the Hub. Name a folder")
    if isinstance(where, StoreAddress) and where.scheme == "memory":
        raise RefusedError(
            f"{where}: the memory of this command, which ends with it. Name a folder"
        )
    return where


def new_folder(text: str) -> Path:
    """Return the local folder to write. Raises `RefusedError` for an address."""
    where = new_target(text)
    if isinstance(where, StoreAddress):
        raise RefusedError(f"{where}: only a conversion writes to a store. {_WRITE_HERE}")
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
