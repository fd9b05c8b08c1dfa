"""The command line: argparse over the public functions."""

from llamaconv.cli.commands import main

__all__ = ["main"]
