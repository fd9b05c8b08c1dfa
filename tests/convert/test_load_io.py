"""What a checkpoint cut with `--shards N` costs N ranks to load: its bytes once, not N times."""

import json
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import einops
import pytest
import torch
from support import checkpoints

from llamaconv import Target, convert_checkpoint, make_plan, open_checkpoint
from llamaconv.model.names import every_role
from llamaconv.model.params import LlamaParams

pytestmark = pytest.mark.thorough

# About 90 MB in bf16. The vocabulary is odd, so no number of ranks shares it evenly. The tensors are few and
# long, since torch.load reads some 20 to 30 kB beside the bytes of each entry, however long it is.
MODEL = replace(checkpoints.GQA, dim=512, n_layers=4, head_dim=64, ffn_dim=4096, vocab_size=16001)
# Norms of 8 rows, an odd vocabulary and 16 chunks: more chunks than some tensors have rows.
NARROW = replace(checkpoints.GQA, dim=8, n_heads=4, n_kv_heads=2, ffn_dim=20, vocab_size=37)
CHUNKS = (1, 2, 3, 4)


def expected(params: LlamaParams, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors as TorchTitan names and orders them, by einops and not by the engine."""
    found = {}
    for role, layer in every_role(params):
        weight = weights[str(role.in_naming("huggingface", layer))]
        if role.heads:
            heads = getattr(params, role.heads)
            weight = einops.rearrange(weight, "(h pair d) c -> (h d pair) c", h=heads, pair=2)
        found[str(role.in_naming("titan-0.3", layer))] = weight.contiguous()
    return found


def write(folder: Path, params: LlamaParams, chunks: Iterable[int]) -> Path:
    """A folder with the expected tensors, and a DCP a number of chunks beside them."""
    source = checkpoints.write_model(folder / "source", params)
    torch.save(expected(params, checkpoints.tensors(params)), folder / "weights.pt")
    for shards in chunks:
        plan = make_plan(open_checkpoint(source), Target(shards=shards))
        convert_checkpoint(plan, folder / str(shards), verified=False)
    return folder


def load(folder: Path, ranks: int, loads: list[tuple[int, str]]) -> list[tuple[float, list[str]]]:
    """A load each: bytes read by all ranks over those of the checkpoint's files, names that differ."""
    job = {
        "weights": str(folder / "weights.pt"),
        "loads": [(str(folder / str(shards)), held) for shards, held in loads],
    }
    files = folder / f"job-{ranks}.json", folder / f"found-{ranks}.json"
    files[0].write_text(json.dumps(job))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command += [
        "--standalone",
        str(Path(__file__).parents[1] / "support" / "ranks_load.py"),
        *map(str, files),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return [
        (n_read / sum(file.stat().st_size for file in Path(where).iterdir()), differ)
        for (n_read, differ), (where, _) in zip(
            json.loads(files[1].read_text()), job["loads"], strict=True
        )
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("model"), MODEL, CHUNKS)


Loaded = tuple[int, dict[tuple[int, str], tuple[float, list[str]]]]


@pytest.fixture(scope="module", params=[2, 4])
def loaded(model: Path, request: pytest.FixtureRequest) -> Loaded:
    """The number of ranks, and a load by chunks and by how the tensors are held."""
    loads = [(shards, held) for held in ("rows", "fsdp") for shards in CHUNKS]
    return request.param, dict(zip(loads, load(model, request.param, loads), strict=True))


def test_every_rank_gets_its_rows_to_the_bit_from_any_number_of_chunks(loaded: Loaded) -> None:
    _, loads = loaded
    assert [differ for _, differ in loads.values()] == [[]] * 8


@pytest.mark.parametrize("held", ["rows", "fsdp"])
def test_with_a_chunk_a_rank_everything_is_read_once(loaded: Loaded, held: str) -> None:
    ranks, loads = loaded
    assert 0.95 < loads[ranks, held][0] < 1.1
    # Without chunks every rank reads everything; the figure above can fail.
    assert 0.95 * ranks < loads[1, held][0] < 1.1 * ranks


def test_more_chunks_than_rows_load_as_well(tmp_path: Path) -> None:
    folder = write(tmp_path, NARROW, [16])
    norm = open_checkpoint(folder / "16").tensors["norm.weight"]
    assert norm.shape == (8,) and len(norm.pieces) == 8
    found = load(folder, 4, [(16, "rows"), (16, "fsdp")])
    assert [differ for _, differ in found] == [[], []]
