"""The command ``notebooks``: copy the notebooks to a folder, and open JupyterLab there."""

from __future__ import annotations

import argparse
import os
import sys
from importlib.util import find_spec
from typing import Any

from llamaconv.cli.common import json_option, new_folder, print_json
from llamaconv.notebook.copies import write_notebooks
from llamaconv.report import shell
from llamaconv.report.errors import FailedError, printable


def add_notebooks(commands: Any) -> None:
    """Add the command to the subparsers."""
    command: argparse.ArgumentParser = commands.add_parser(
        "notebooks", help="write the notebooks to a folder; they open in JupyterLab"
    )
    command.add_argument("folder", metavar="DST", help="the folder to write; edited files are kept")
    command.add_argument("--open", action="store_true", help="open JupyterLab there")
    json_option(command, _notebooks)


def _notebooks(options: argparse.Namespace) -> int:
    folder = new_folder(options.folder)
    written = write_notebooks(folder)
    words = ["jupyter", "lab", str(folder)]
    if options.json:
        print_json({"ok": True, "notebooks": [str(path) for path in written], "next": words})
    else:
        print(printable(f"{folder}: {len(written)} notebooks, {written[0].name} is the first"))
        print(f"next: {shell.join(words)}")
    if find_spec("jupyterlab") is None:
        remedy = "install llamaconv with its extra: pip install 'llamaconv[notebooks]'"
        if options.open:
            raise FailedError(f"JupyterLab is not installed; {remedy}")
        print(f"note: JupyterLab is not installed; {remedy}", file=sys.stderr)
        return 0
    if options.open:
        sys.stdout.flush()
        # In place of this process, so that Ctrl-C is JupyterLab's alone.
        os.execv(sys.executable, [sys.executable, "-m", "jupyterlab", str(folder)])
    return 0
