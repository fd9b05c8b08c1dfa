"""How fast and how small: conversions and their peers, in pairs with a plain copy.

    python tests/bench/run.py [--gigabytes 3] [--pairs 5] [--folder DIR] [--out DIR]
        [--directions hf-dcp,dcp-hf,meta-dcp,hf-meta,cast] [--peers all] [--cache warm]
        [--no-checks]

Makes the inputs, and in each round copies the source (the target, where a cast makes it the larger
side) with ``cp`` and an fsync a file, and converts it, in turns which is first. The rounds of ours
have both its runs, without and with checks, and the disk alone: direct writers of as many bytes.
Before each, the last output is deleted and the disk has settled, and the inputs are read into the
page cache (``warm``) or put out of it (``cold``); what a run leaves unsynced is synced in its time.
Writes bench.json, bench.md and bench.png to ``--out``. Fails nowhere: what a peer cannot do is a row.

The limit: one machine at one time. Its noise is in the tables, as the spread of the copies.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import inputs
import measure
import peers
import report

DIRECTIONS = {
    "hf-dcp": ("hf", ["--to", "dcp"]),
    "dcp-hf": ("dcp", ["--to", "hf"]),
    "meta-dcp": ("meta", ["--to", "dcp"]),
    "hf-meta": ("hf", ["--to", "meta"]),
    "cast": ("hf", ["--to", "dcp", "--dtype", "float32"]),
}
_REST_SECONDS = 4
CONVERT = [sys.executable, "-m", "llamaconv", "convert"]


@dataclass(frozen=True)
class Contestant:
    """A program and what its ratios are called; ours reports the engine's own seconds too."""

    name: str
    command: Callable[[Path, Path], list[str]]
    otherwise: str = ""
    ours: bool = False
    generation: str = "titan-0.3"

    @property
    def is_llamaconv(self) -> bool:
        return self.name.startswith("llamaconv")


def ours(extra: list[str], checks: bool) -> list[Contestant]:
    def command(*checks: str) -> Callable[[Path, Path], list[str]]:
        return lambda source, target: [
            *CONVERT,
            str(source),
            str(target),
            "--json",
            *extra,
            *checks,
        ]

    unchecked = Contestant("llamaconv", command("--no-verify"), "imports included, no checks", True)
    checked = Contestant("llamaconv, verified", command(), "imports and checks included")
    return [unchecked, checked] if checks else [unchecked]


def contestants(direction: str, options: argparse.Namespace, rows: list[dict]) -> list[Contestant]:
    """Ours and the peers of a direction; a peer that cannot be installed becomes a row at once."""
    found = ours(DIRECTIONS[direction][1], not options.no_checks)
    for peer in peers.chosen(options.peers):
        if direction not in peer.directions:
            continue
        try:
            start = peer.command(options.envs)
        except RuntimeError as error:
            rows.append(report.failed(direction, peer.name, peer.otherwise, str(error)))
            continue
        found.append(
            Contestant(
                peer.name,
                lambda source, target, start=start: [*start, str(source), str(target)],
                peer.otherwise,
                generation=peer.generation,
            )
        )
    return found


class Bench:
    """The folders of one run, and measuring one direction in them."""

    def __init__(self, folder: Path, warm: bool, pairs: int) -> None:
        self.folder = folder
        self.target = folder / "target"
        self.warm = warm
        self.pairs = pairs
        self.environment = {k: v for k, v in os.environ.items() if k != "RANK"}

    def source(self, kind: str, params: inputs.LlamaParams) -> Path:
        """The Hugging Face folder, or what our own conversion makes of it."""
        source, made = self.folder / "hf", self.folder / kind
        if not source.exists():
            inputs.write(source, params)
        if not made.exists():
            self._make(["--to", kind], made)
        return made

    def _make(self, extra: list[str], target: Path) -> None:
        command = [*CONVERT, str(self.folder / "hf"), str(target), "--json", "--no-verify"]
        done = measure.run([*command, *extra], environment=self.environment)
        if done.failure:
            raise SystemExit(f"making {target.name} failed: {done.failure}")

    def direction(self, name: str, source: Path, programs: list[Contestant]) -> list[dict]:
        copied = source
        if name == "cast":
            copied = self.folder / "cast"
            self._make(DIRECTIONS[name][1], copied)
        # Ours in the same rounds; each peer has rounds of its own, since most take long.
        mine = [program for program in programs if program.is_llamaconv]
        peers_alone = [[program] for program in programs if not program.is_llamaconv]
        rows = []
        for group in [mine, *peers_alone]:
            print(f"{name}: {', '.join(one.name for one in group)}", file=sys.stderr, flush=True)
            reads, generation = source, group[0].generation
            if source.name == "dcp" and generation != "titan-0.3":
                reads = self.folder / generation
                self._make(["--to", "dcp", "--generation", generation], reads)
            rows += self._pairs(name, reads, copied, group)
            if reads is not source:
                shutil.rmtree(reads)
        if copied is not source:
            shutil.rmtree(copied)
        return rows

    def _pairs(
        self, name: str, source: Path, copied: Path, programs: list[Contestant]
    ) -> list[dict]:
        """Rounds of a copy and each program; rows of what they took."""
        runs: dict[str, list[measure.Measurement]] = {one.name: [] for one in programs}
        failed: dict[str, dict] = {}
        copies: list[float] = []
        disk: list[float] = []
        n_bytes = 0
        for number in range(self.pairs):
            turns = [None, *programs] if number % 2 == 0 else [*reversed(programs), None]
            for program in turns:
                if program is None:
                    measure.cache(copied, warm=self.warm)
                    copies.append(measure.copy(copied, self.target))
                elif program.name not in failed:
                    measure.cache(source, warm=self.warm)
                    command = program.command(source, self.target)
                    done = measure.run(command, environment=self.environment, sync=self.target)
                    if done.failure:
                        what = (name, program.name, program.otherwise, done.failure, done)
                        failed[program.name] = report.failed(*what)
                    else:
                        runs[program.name].append(done)
                        n_bytes = max(n_bytes, _nbytes(self.target))
                self._clear()
            if n_bytes and any(program.ours for program in programs):
                disk.append(measure.direct(self.folder, n_bytes))
                self._clear()
        rows: list[dict] = []
        for program in programs:
            if program.name in failed:
                rows.append(failed[program.name])
                continue
            its = runs[program.name]
            row = report.row(name, program.name, program.otherwise, its, copies, n_bytes)
            if program.ours:
                engine = [json.loads(run.output)["seconds"] for run in its]
                rows += [report.engine(row, engine, copies, disk), row]
                rows.append(report.disk(row, disk, copies))
            else:
                rows.append(row)
        return rows

    def _clear(self) -> None:
        # A run that was stopped leaves its unfinished folder beside the target.
        for left in self.folder.glob(f"{self.target.name}*"):
            shutil.rmtree(left)
        os.sync()
        # The disk still discards what was deleted. A copy would meet that; a program that first
        # imports for two seconds would not.
        time.sleep(_REST_SECONDS)


def _nbytes(folder: Path) -> int:
    files = (file.lstat().st_size for file in folder.rglob("*") if not file.is_symlink())
    return sum(files)


def main() -> None:
    options = _options()
    params = inputs.of_size(options.gigabytes * 1e9)
    n_bytes = inputs.size(params)
    warm = options.cache == "warm"
    if options.cache == "auto":
        # Source, target and dirty pages have to fit beside what a peer holds.
        warm = 4 * n_bytes < measure.machine()["memory"]
    rows: list[dict] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        bench = Bench(Path(temporary), warm, options.pairs)
        about = report.about(bench.folder, params, n_bytes, warm, options.pairs)
        for name in options.directions:
            kind = DIRECTIONS[name][0]
            # The first input, this direction's own and a target; the cast's are twice as long.
            needed = (5 if name == "cast" else 3) * n_bytes
            free = shutil.disk_usage(bench.folder).free + _nbytes(bench.folder)
            if needed > free:
                reason = f"needs {needed / 1e9:.0f} GB of disk, {free / 1e9:.0f} GB are free"
                rows.append(report.failed(name, "all", "", reason))
                continue
            source = bench.source(kind, params)
            rows += bench.direction(name, source, contestants(name, options, rows))
            if kind != "hf":
                shutil.rmtree(source)
            report.write(options.out, about, rows)  # what is done is kept, whatever comes
    print((options.out / "bench.md").read_text())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gigabytes", type=float, default=3.0, help="bytes of weights in bf16")
    parser.add_argument("--pairs", type=int, default=5, help="pairs of copy and run (default 5)")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--directions", default=",".join(DIRECTIONS))
    parser.add_argument("--peers", default="all", help="all, none, or names between commas")
    parser.add_argument("--no-checks", action="store_true", help="leave out our run with checks")
    parser.add_argument("--cache", choices=("auto", "warm", "cold"), default="auto")
    parser.add_argument("--out", type=Path, default=Path("bench-out"), help="for the reports")
    home = os.environ.get("LLAMACONV_BENCH_ENVS") or peers.HERE.parents[1] / ".interop"
    parser.add_argument("--envs", type=Path, default=Path(home), help="the peers' environments")
    options = parser.parse_args()
    options.directions = options.directions.split(",")
    if unknown := set(options.directions) - set(DIRECTIONS):
        parser.error(f"no direction is called {', '.join(unknown)}; see {', '.join(DIRECTIONS)}")
    return options


if __name__ == "__main__":
    main()
