"""Checkpoints that cross from one torch and Python to another, as between a laptop and a cluster.

    LLAMACONV_PYTHONS=old/bin/python:new/bin/python pytest tests/exchange

Each of these interpreters has llamaconv, and a torch of its own. LLAMACONV_LOADERS names further
ones that have torch and safetensors alone, such as environments of TorchTitan.
"""

import json
import os
import subprocess
from itertools import product
from pathlib import Path

import pytest
import torch

from llamaconv import Target, convert_checkpoint, make_plan, open_checkpoint, sample_path

SIDE = Path(__file__).with_name("side.py")


def interpreters(variable: str) -> list[Path]:
    """Those that the environment names, in its order."""
    return [Path(one) for one in os.environ.get(variable, "").split(":") if one]


def run(*words: object) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in words], text=True, capture_output=True, env=environment
    )
    assert done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def pythons() -> list[Path]:
    found = interpreters("LLAMACONV_PYTHONS")
    code = "import torch, sys; print(torch.__version__, *sys.version_info[:2])"
    versions = [run(python, "-c", code) for python in found]
    assert len(set(versions)) > 1, "LLAMACONV_PYTHONS names interpreters with different torches"
    print(*versions)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exchange")


@pytest.fixture(scope="module")
def sample(folder: Path) -> Path:
    """The sample's tensors by TorchTitan's names, in one file; torch here has read them."""
    plan = make_plan(open_checkpoint(sample_path()), Target())
    target = convert_checkpoint(plan, folder / "here").target
    state = {
        name: torch.empty(t.shape, dtype=getattr(torch, t.dtype))
        for name, t in open_checkpoint(target).tensors.items()
    }
    torch.distributed.checkpoint.load(state, checkpoint_id=target, no_dist=True)
    torch.save(state, folder / "sample.pt")
    return folder / "sample.pt"


def test_what_we_write_is_the_same_and_loads_under_every_torch(
    pythons: list[Path], sample: Path, folder: Path
) -> None:
    targets = [folder / f"by-{number}" for number in range(len(pythons))]
    for python, target in zip(pythons, targets, strict=True):
        words = ("convert", sample_path(), target, "--shards", 3, "--quiet", "--json")
        assert json.loads(run(python, "-m", "llamaconv", *words))["verified"]
    assert len({(target / ".metadata").read_bytes() for target in targets}) == 1
    for python, target in product([*pythons, *interpreters("LLAMACONV_LOADERS")], targets):
        print(target.name, run(python, SIDE, "load", sample, target).strip())


@pytest.mark.parametrize("kind", ["whole", "trainer", "sharded"])
def test_what_torch_saves_converts_under_every_torch(
    pythons: list[Path], sample: Path, folder: Path, kind: str
) -> None:
    expected = torch.load(sample, weights_only=True)
    for number, python in enumerate(pythons):
        saved = folder / f"saved-{number}"
        if not saved.exists():
            saved.mkdir()
            print(run(python, SIDE, "save", sample, saved).strip())
        for other, reader in enumerate(pythons):
            back, again = (folder / f"{kind}-{number}-{other}-{to}" for to in ("hf", "dcp"))
            options = ("--to", "hf", "--assets", sample_path(), "--quiet", "--json")
            words = ("convert", saved / kind, back, *options)
            assert json.loads(run(reader, "-m", "llamaconv", *words))["verified"]
            # Back in TorchTitan's names by the Python of this test, which compares.
            convert_checkpoint(make_plan(open_checkpoint(back), Target()), again, verified=False)
            found = {name: torch.full_like(one, torch.nan) for name, one in expected.items()}
            torch.distributed.checkpoint.load(found, checkpoint_id=again, no_dist=True)
            assert all(torch.equal(one, found[name]) for name, one in expected.items())
