"""Memory that does not grow with the model: not with its bytes, nor with its widths.

Sources are sparse: true headers, weights that read as zeros. Every byte is still read, re-ordered,
hashed, written, read back and compared. `tests/bench/memory.py` measures whole models this way.
"""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import inputs
import measure
import pytest

pytestmark = pytest.mark.thorough

# As wide as 1B and as 70B, with few layers.
NARROW = replace(inputs.SHAPES["1B"], n_layers=2, ffn_dim=1024, vocab_size=4096, tied=False)
WIDE = replace(inputs.SHAPES["70B"], n_layers=2, ffn_dim=2048, vocab_size=16384)
# In MB. What a process holds on top of torch, and what that may vary between two runs (86 were
# seen once): less than one q of WIDE has (134), not to speak of its embedding (268) or all of it.
MOST, NOISE = 250, 120
# Source, target, options; each target is a source further down, or none.
DIRECTIONS = (
    ("hf", "dcp", ["--to", "dcp"]),
    ("dcp", "back", ["--to", "hf"]),
    ("hf", "meta", ["--to", "meta", "--shards", "2"]),
    ("meta", "sharded", ["--to", "dcp", "--shards", "2"]),
    ("hf", "cast", ["--to", "dcp", "--dtype", "float32"]),
)


def peaks(folder: Path, params: inputs.LlamaParams) -> dict[str, tuple[float, float]]:
    """Anonymous memory at the peak, in MB, of making each target and of checking it."""
    inputs.write(folder / "hf", params, sparse=True)
    found = {}
    for source, target, options in DIRECTIONS:
        paths = [str(folder / source), str(folder / target)]
        convert = ["convert", *paths, *options, "--no-verify", "--quiet"]
        made, checked = (
            measure.run([sys.executable, "-m", "llamaconv", *words])
            for words in (convert, ["verify", *paths])
        )
        assert not made.failure + checked.failure
        found[target] = made.anonymous / 1e6, checked.anonymous / 1e6
    shutil.rmtree(folder)
    return found


def test_memory_is_the_same_for_every_model(tmp_path: Path) -> None:
    torch_alone = measure.run([sys.executable, "-c", "import torch"]).anonymous / 1e6
    narrow, wide = peaks(tmp_path / "narrow", NARROW), peaks(tmp_path / "wide", WIDE)
    for target in narrow:
        for step, small, large in zip(
            ("made", "checked"), narrow[target], wide[target], strict=True
        ):
            found = f"{target} {step}: {small:.0f} and {large:.0f} MB, torch {torch_alone:.0f}"
            print(found)
            assert small < torch_alone + MOST, found
            assert large < small + NOISE, found
