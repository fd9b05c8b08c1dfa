"""How much memory conversions and their checks take, for models larger than memory and disk.

    python tests/bench/memory.py [--shape 1B,8B] [--folder DIR] [--out DIR]

The source is sparse: true headers, weights that read as zeros. Where blocks of zeros are to be
written, the file is made that much longer instead, so the target is sparse too; it is verified, and
is the source of the way back, like any other. So 70B, 141 GB a side, runs where 1 GB is free. Writes
memory.json and memory.md to --out.

The limit: this says nothing about speed nor about values; every byte is still read, re-ordered, hashed,
read back and compared. `run.py` has the peaks for true values that are truly written.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import inputs
import measure
import report

# Source, target, options; "files" stands for as many files as Meta has of a model of that size.
DIRECTIONS = (
    ("hf", "dcp", []),
    ("dcp", "hf", []),
    ("hf", "meta", ["--shards", "files"]),
    ("meta", "dcp", []),
    ("hf", "dcp", ["--shards", "8"]),
    ("hf", "dcp", ["--dtype", "float32"]),
)
META_FILES = {"1B": 1, "8B": 1, "70B": 8, "405B": 16}
# The command, but for the question whether all of the target would fit on the disk, and for zeros.
CONVERT = """
import functools, shutil, sys
from xxhash import xxh3_128_digest
from llamaconv.cli import main
from llamaconv.convert.disk_file import DiskFile

ask, write = shutil.disk_usage, DiskFile.write
shutil.disk_usage = lambda path: ask(path)._replace(free=1 << 62)

@functools.cache
def of_zeros(n_bytes):
    return xxh3_128_digest(bytes(n_bytes))

def write_or_skip(self, data):
    n_bytes = memoryview(data).nbytes
    if n_bytes < 1 << 16 or xxh3_128_digest(data) != of_zeros(n_bytes):
        return write(self, data)
    self._file.seek(n_bytes, 1)
    return n_bytes

DiskFile.write = write_or_skip
sys.exit(main(sys.argv[1:]))
"""


def measure_shape(shape: str, folder: Path, n_directions: int) -> list[report.Row]:
    """A row a direction for a model of ``shape``, each converted and then verified."""
    inputs.write(folder / "hf", inputs.SHAPES[shape], sparse=True)
    rows = []
    for source, to, extra in DIRECTIONS[:n_directions]:
        options = [str(META_FILES[shape]) if word == "files" else word for word in extra]
        label = f"{source} to {to} {' '.join(options)}".strip()
        print(f"{shape}: {label}", file=sys.stderr, flush=True)
        rows.append(_measure(shape, label, folder, source, ["--to", to, *options]))
        # The first of its kind is a source further down.
        target, kept = folder / "target", folder / to
        if target.exists() and not kept.exists() and "failure" not in rows[-1]:
            target.rename(kept)
        shutil.rmtree(target, ignore_errors=True)
    return rows


def _measure(shape: str, label: str, folder: Path, source: str, options: list[str]) -> report.Row:
    paths = [str(folder / source), str(folder / "target")]
    row: report.Row = {"shape": shape, "direction": label}
    if not Path(paths[0]).exists():
        return {**row, "failure": "its source could not be made, see above"}
    command = [sys.executable, "-c", CONVERT, "convert", *paths, *options, "--no-verify", "--json"]
    written = measure.run(command)
    if written.failure:
        return {**row, "failure": f"convert: {written.failure}"}
    said = json.loads(written.output)
    row |= {"bytes": said["bytes_written"], "convert": _peaks(written)}
    checked = measure.run([sys.executable, "-m", "llamaconv", "verify", *paths, "--json"])
    row["verify"] = _peaks(checked)
    if checked.failure:
        row["failure"] = f"verify: {checked.failure}"
    return row


def _peaks(run: measure.Measurement) -> report.Row:
    return {
        name: getattr(run, name)
        for name in ("resident", "anonymous", "mapped", "asked", "handed", "seconds")
    }


def idle() -> measure.Measurement:
    """What an interpreter takes that has only imported the engine; the rest is the conversion's."""
    imports = "import llamaconv.convert.convert, torch.distributed.checkpoint as d; d.save"
    return measure.run([sys.executable, "-c", f"{imports}; import time; time.sleep(0.2)"])


def markdown(about: report.Row, rows: list[report.Row]) -> str:
    lines = [
        f"{report.machine_line(about)} Sparse files: zeros, read in full. An "
        f"interpreter that has only imported the engine takes {report.nbytes(about['idle'])} "
        f"({report.nbytes(about['idle_anonymous'])} anonymous).",
        "",
        "| shape | direction | written | convert: resident | anonymous | of files "
        "| verify: resident | anonymous | of files |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["shape"], row["direction"]]
        cells.append(report.nbytes(row["bytes"]) if "bytes" in row else "")
        for step in ("convert", "verify"):
            peaks = row.get(step)
            names = ("resident", "anonymous", "mapped")
            cells += [report.nbytes(peaks[name]) if peaks else "" for name in names]
        if "failure" in row:
            cells[2] += f" did not end: {row['failure']}"
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", default="1B,8B", help=f"of {', '.join(inputs.SHAPES)}")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--out", type=Path, default=Path("bench-out"), help="for the reports")
    parser.add_argument("--layers", type=int, help="fewer layers, for a quick look")
    parser.add_argument("--directions", type=int, default=len(DIRECTIONS), help="the first so many")
    options = parser.parse_args()
    if options.layers:
        for name, params in inputs.SHAPES.items():
            inputs.SHAPES[name] = replace(params, n_layers=options.layers)
    base = idle()
    about = {**report.machine(), "idle": base.resident, "idle_anonymous": base.anonymous}
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[report.Row] = []
    for shape in options.shape.split(","):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            rows += measure_shape(shape, Path(folder), options.directions)
        content = json.dumps({"about": about, "rows": rows}, indent=1)
        (options.out / "memory.json").write_text(content)
        (options.out / "memory.md").write_text(markdown(about, rows))
    print((options.out / "memory.md").read_text())


if __name__ == "__main__":
    main()
