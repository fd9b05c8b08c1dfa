"""The commands that only look: inspect and compare. They write nothing."""

from __future__ import annotations

import argparse
import difflib
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llamaconv.checkpoint.checkpoint import Checkpoint
from llamaconv.checkpoint.value_statistics import folded_statistics, statistics_table
from llamaconv.cli.common import FOLDER, OR_REMOTE, json_option, print_json, say
from llamaconv.model.published import closest_published
from llamaconv.plan.assets import contradictions
from llamaconv.plan.planner import with_header_errors
from llamaconv.report.errors import RefusedError, printable
from llamaconv.report.tables import Table

if TYPE_CHECKING:
    from llamaconv.checkpoint.against_hub import Against
    from llamaconv.verify.layers_run import LayersRun

DIFFERENT = 1
"""The exit status of ``compare`` for two checkpoints that differ, as of diff and cmp."""

# torch is imported by what reads weights, not by what reads headers.


def add_inspect(commands: Any) -> None:
    """Add ``inspect`` to the subparsers ``commands``."""
    inspect = commands.add_parser(
        "inspect", help="show what a checkpoint contains; reads headers only"
    )
    inspect.add_argument("source", metavar="PATH", help=f"{FOLDER}{OR_REMOTE}")
    inspect.add_argument(
        "--all", action="store_true", help="one row per tensor, instead of one for all layers"
    )
    inspect.add_argument(
        "--values",
        action="store_true",
        help="read all weights too: statistics, NaN and infinities, zeros, tensors that are copies",
    )
    inspect.add_argument(
        "--tensor", metavar="NAME", help="read one tensor: its statistics and a histogram"
    )
    inspect.add_argument(
        "--against",
        metavar="hf://ORG/NAME[@REVISION]",
        help="compare the files of the folder with the digests that the repository lists",
    )
    json_option(inspect, _inspect)


def add_compare(commands: Any) -> None:
    """Add ``compare`` to the subparsers ``commands``."""
    compare = commands.add_parser(
        "compare",
        help="compare the values of two checkpoints, whatever their formats and layouts",
        epilog="exit status: 0 equal, 1 different, 2 refused, or not all could be compared",
    )
    compare.add_argument("source", metavar="A", help=FOLDER)
    compare.add_argument("other", metavar="B", help=FOLDER)
    compare.add_argument("--all", action="store_true", help="list every tensor that differs")
    compare.add_argument(
        "--assets",
        default="",
        metavar="DIR",
        help="folder with the model's config.json, for checkpoints that lack it, such as the steps "
        "of a training run",
    )
    compare.add_argument(
        "--run",
        action="store_true",
        dest="run_layers",
        help="run both on a short text too, a layer at a time: which layer is the first to diverge",
    )
    json_option(compare, _compare)


def _compare(options: argparse.Namespace) -> int:
    from llamaconv.report.progress import Bar
    from llamaconv.verify.compare import compare_checkpoints

    with Bar(quiet=options.json) as bar:
        compared = compare_checkpoints(options.source, options.other, bar, options.assets)
    run = None
    if options.run_layers:
        words = (options.source, options.other, options.assets)
        run = run_side_by_side(*words, quiet=options.json)
    if options.json:
        print_json(compared.to_json() | ({"run": run.to_json()} if run else {}))
    else:
        most = len(compared.pairs) if options.all else 20
        print(compared.table(most) if compared.different else compared.summary())
        for line in compared.lines(most):
            print(line)
        if run:
            print(f"\n{run.table()}")
    say(compared.errors)
    if not compared.equal or (run and run.diverges):
        return DIFFERENT
    return RefusedError.status if compared.errors else 0


def run_side_by_side(one: str, other: str, assets: str, quiet: bool) -> LayersRun:
    """Run two checkpoints a layer at a time; say before how long it takes, unless ``quiet``."""
    from llamaconv.report.progress import Bar
    from llamaconv.verify.layers import run_layers
    from llamaconv.verify.sides import open_sides

    def announce(text: str) -> None:
        if not quiet:
            print(text, file=sys.stderr, flush=True)

    sides, _ = open_sides(one, other, assets)
    with Bar(quiet=quiet) as bar:
        return run_layers(sides, bar, announce)


def _inspect(options: argparse.Namespace) -> int:
    from llamaconv.checkpoint.open import open_checkpoint

    checkpoint = open_checkpoint(options.source)
    if options.tensor is not None:
        return _inspect_tensor(checkpoint, options)
    more, values, against = contradictions(checkpoint), None, None
    if options.against is not None:
        against = _against(checkpoint, options)
        more += against.problems(checkpoint.local_path)
    if options.values:
        values = _Values(checkpoint, quiet=options.json)
        more += values.problems
    checkpoint = with_header_errors(checkpoint)
    checkpoint = replace(checkpoint, problems=(*checkpoint.problems, *more))
    if options.json:
        compared = {"against": against.to_json()} if against else {}
        print_json(checkpoint.to_json() | compared | (values.to_json() if values else {}))
    else:
        print(
            checkpoint.table(most=len(checkpoint.tensors)) if options.all else checkpoint.folded()
        )
        if values:
            print(f"\n{values.table(options.all)}")
        if checkpoint.params:
            print(f"\n{closest_published(checkpoint.params).title}\n{checkpoint.params}")
        for ignored in checkpoint.ignored:
            print(printable(f"ignored: {ignored}"))
        if against:
            print(printable(str(against)))
        if values and not values.odd:
            print(f"values: all {checkpoint.parameters:,} are finite, and no tensor is all zero")
    say(checkpoint.problems)
    return RefusedError.status if checkpoint.errors else 0


def _against(checkpoint: Checkpoint, options: argparse.Namespace) -> Against:
    from llamaconv.checkpoint.against_hub import compare_with_repository
    from llamaconv.report.progress import Bar

    with Bar(quiet=options.json) as bar:
        return compare_with_repository(checkpoint.local_path, options.against, bar)


class _Values:
    """What ``--values`` found."""

    def __init__(self, checkpoint: Checkpoint, quiet: bool) -> None:
        from llamaconv.checkpoint import weight_values
        from llamaconv.checkpoint.fused import split_fused
        from llamaconv.report.progress import Bar

        # Role by role: a row of zeros is one of q or of v, and a window fits in memory.
        checkpoint = split_fused(checkpoint)
        with Bar(quiet=quiet) as bar:
            self.statistics = weight_values.scan_statistics(checkpoint, bar)
        self.copies = weight_values.copies(checkpoint, self.statistics)
        self.odd = weight_values.odd_values(self.statistics)
        self.problems = weight_values.value_problems(checkpoint.path, self.odd)
        self.problems += weight_values.suspicious_values(checkpoint, self.statistics)

    def table(self, each: bool) -> Table:
        """Return one row per tensor, or one for all layers of a role."""
        rows = self.statistics if each else folded_statistics(self.statistics)
        return statistics_table(rows, self.copies, most=len(rows))

    def to_json(self) -> dict[str, Any]:
        return {
            "values": [one.to_json() for one in self.odd],
            "statistics": [one.to_json() for one in self.statistics],
            "copies": [list(names) for names in self.copies],
        }


def _inspect_tensor(checkpoint: Checkpoint, options: argparse.Namespace) -> int:
    from llamaconv.checkpoint.fused import split_fused
    from llamaconv.checkpoint.weight_values import histogram

    parts = split_fused(checkpoint).tensors
    tensor = checkpoint.tensors.get(options.tensor) or parts.get(options.tensor)
    if tensor is None:
        close = difflib.get_close_matches(options.tensor, checkpoint.tensors, 3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ", see --all"
        raise RefusedError(f"{checkpoint.path}: has no tensor {options.tensor}{hint}")
    found = histogram(tensor)
    if options.json:
        bars = {"lowest": found.lowest, "highest": found.highest, "counts": [*found.counts]}
        far = {"below": found.n_below, "above": found.n_above}
        print_json(found.of.to_json() | {"histogram": bars | far})
    else:
        print(f"{statistics_table([found.of])}\n\n{found}")
    return 0
