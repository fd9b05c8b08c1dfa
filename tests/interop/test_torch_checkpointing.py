"""What torch_checkpointing itself saved converts to the bit, and its own loader says the same.

The package saves one model from 1 and from 4 gloo ranks, as files of torch.save and as safetensors, cut
in every way that DTensors are. llamaconv converts each folder to the form with the same names; the
weights that the package was given are the reference. Its own loader reads the folders as well, also with
metadata of version 1.0, which this release reads and no longer writes.
"""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import checkpoints
from support.folders import load_dcp, of_main, tensors_of, to_version_1
from titan_env import RELEASES, run_side

from llamaconv import Target, convert_checkpoint, make_plan, open_checkpoint
from llamaconv.verify.compare import compare_checkpoints

# Rows that four ranks cannot share evenly, in the vocabulary, in the feed-forward, and in a head.
UNEVEN = replace(
    checkpoints.GQA,
    dim=54,
    vocab_size=81,
    ffn_dim=90,
    n_layers=2,
    n_heads=9,
    n_kv_heads=3,
    head_dim=6,
)
# Folders of store_side.py, and the names in them.
NAMINGS = {
    "one": "titan-0.3",
    "one-st": "titan-main",
    "fsdp": "titan-0.3",
    "fsdp-st": "titan-0.3",
    "main": "titan-main",
    "main-2d-st": "titan-main",
    "columns": "titan-0.3",
    "copies": "huggingface",
    "strided": "titan-main",
    "background": "titan-0.3",
    "scattered-st": "titan-main",
}
# A strided cut may leave a rank several runs of rows. The package loads them from its file as if they were
# one (0.1.1, `compute_local_shard_info` keeps the first row), and gives other values than it was given.
NOT_ITS_OWN = ("scattered-st",)

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``source``, the same weights by naming in ``weights.pt``, and a folder for each kind."""
    home = tmp_path_factory.mktemp("store")
    source = checkpoints.write_model(home / "source", UNEVEN)
    plan = make_plan(open_checkpoint(source))
    titan = load_dcp(convert_checkpoint(plan, home / "titan", verified=False).target)
    namings = {
        "titan-0.3": titan,
        "titan-main": of_main(titan, UNEVEN),
        "huggingface": checkpoints.tensors(UNEVEN),
    }
    torch.save(namings, home / "weights.pt")
    side(home, "save", {"home": str(home)})
    return home


def side(home: Path, mode: str, job: dict[str, Any]) -> Any:
    job = job | {"weights": str(home / "weights.pt")}
    return run_side(RELEASES[-1].make(), ["store_side.py", mode], job, home / f"job-{mode}")[0]


@pytest.fixture(scope="module")
def given(home: Path) -> dict[str, State]:
    loaded: dict[str, State] = torch.load(home / "weights.pt", weights_only=True)
    return loaded


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


@pytest.mark.parametrize("kind", NAMINGS)
@pytest.mark.parametrize("version", ["2.0", "1.0"])
def test_what_the_package_saved_converts_to_the_bit(
    home: Path, given: dict[str, State], tmp_path: Path, kind: str, version: str
) -> None:
    folder, naming = shutil.copytree(home / kind, tmp_path / kind), NAMINGS[kind]
    if version == "1.0":
        to_version_1(folder)
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.format, checkpoint.naming) == ("torch_checkpointing", naming)
    assert not checkpoint.problems
    ignored = {one.name: one.reason for one in checkpoint.ignored}
    assert ignored.keys() == {"optimizer", "train_state", "lr_scheduler"}
    is_hf = naming == "huggingface"
    target = Target(to="hf") if is_hf else Target(to="dcp", generation=naming)
    plan = make_plan(checkpoint, replace(target, assets=str(home / "source")))
    done = convert_checkpoint(plan, tmp_path / "target")
    assert done.verification is not None
    assert done.verification.ok
    assert same((tensors_of if is_hf else load_dcp)(done.target), given[naming])


@pytest.mark.parametrize("to", ["hf", "meta"])
@pytest.mark.parametrize("kind", ["main", "columns"])
def test_it_becomes_every_other_format(home: Path, tmp_path: Path, to: str, kind: str) -> None:
    plan = make_plan(open_checkpoint(home / kind), Target(to=to, assets=str(home / "source")))
    done = convert_checkpoint(plan, tmp_path / "target")
    assert done.verification is not None
    assert done.verification.ok
    assert compare_checkpoints(done.target, home / "source").equal


@pytest.mark.parametrize("kind", ["fsdp", "main-2d-st"])
def test_it_compares_equal_to_the_source_and_unequal_after_a_change(
    home: Path, tmp_path: Path, kind: str
) -> None:
    assets = str(home / "source")
    assert compare_checkpoints(home / kind, home / "source", assets=assets).equal
    folder = shutil.copytree(home / kind, tmp_path / kind)
    piece = open_checkpoint(folder).tensors["layers.1.feed_forward.w2.weight"].pieces[-1]
    with open(piece.local_file, "r+b") as file:
        file.seek(piece.offset)
        first = file.read(1)
        file.seek(piece.offset)
        file.write(bytes([first[0] ^ 1]))
    compared = compare_checkpoints(folder, home / "source", assets=assets)
    (pair,) = compared.different
    assert "w2" in str(pair)


def test_the_packages_own_loader_reads_the_same(
    home: Path, given: dict[str, State], tmp_path: Path
) -> None:
    folders = {kind: home / kind for kind in NAMINGS if kind not in NOT_ITS_OWN}
    for kind in ("fsdp", "main-2d-st"):
        before = shutil.copytree(home / kind, tmp_path / kind)
        to_version_1(before)
        folders[f"{kind}, 1.0"] = before
    namings = {kind: NAMINGS[kind.partition(",")[0]] for kind in folders}
    job = {"folders": {kind: str(folder) for kind, folder in folders.items()}, "namings": namings}
    loaded = side(home, "load", job)
    assert loaded.keys() == folders.keys()
    for kind, state in loaded.items():
        assert same(state, given[namings[kind]]), kind
