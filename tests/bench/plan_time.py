"""How long it takes to look into the largest Llama and to plan it, beyond starting an interpreter.

    python tests/bench/plan_time.py [--shape 405B] [--times 9]

The folder is sparse: 191 files of true headers for 405B. Prints the fastest and the median time of each
command less the fastest ``python -c pass``.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import inputs

# At this length 405B comes in as many files as Meta published it in.
_LONGEST_FILE = 4.7e9


def seconds(words: list[str], times: int) -> list[float]:
    found = []
    for _ in range(times):
        began = time.perf_counter()
        subprocess.run([sys.executable, *words], stdout=subprocess.DEVNULL, check=True)
        found.append(time.perf_counter() - began)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", default="405B", choices=inputs.SHAPES)
    parser.add_argument("--times", type=int, default=9)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        params = inputs.SHAPES[options.shape]
        folder = Path(temporary) / options.shape
        inputs.write(folder, params, sparse=True, longest_file=_LONGEST_FILE)
        files = len(list(folder.glob("*.safetensors")))
        print(f"{options.shape}: {files} files, {inputs.size(params) / 1e9:.0f} GB")
        start = min(seconds(["-c", "pass"], options.times))
        print(f"an interpreter alone: {start:.3f} s; beyond it:")
        for command in (["inspect"], ["plan"], ["inspect", "--json"], ["plan", "--json"]):
            words = ["-m", "llamaconv", command[0], str(folder), *command[1:]]
            taken = [one - start for one in seconds(words, options.times)]
            print(f"{' '.join(command)}: {min(taken):.3f} s, median {statistics.median(taken):.3f}")


if __name__ == "__main__":
    main()
