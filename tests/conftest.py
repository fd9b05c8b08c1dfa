"""Fixtures that most tests share: a source folder, and converting it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support import checkpoints, faults, folders

from llamaconv import Target, convert_checkpoint, make_plan, open_checkpoint
from llamaconv.convert.convert import Conversion

# The tensors of tests are small: further threads of torch would only wait for each other, and longer
# the more else runs on the machine. The second line is for kernels and other processes.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A GQA model of twelve layers in three shards."""
    return checkpoints.write(tmp_path / "source")


@pytest.fixture
def convert(tmp_path: Path) -> Callable[..., Conversion]:
    """Converts a folder to a new target, with target options by keyword."""

    def run(
        folder: Path, name: str = "target", verified: bool = True, **options: object
    ) -> Conversion:
        plan = make_plan(open_checkpoint(folder), Target(**options))  # type: ignore[arg-type]
        return convert_checkpoint(plan, tmp_path / name, verified=verified)

    return run


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[faults.Server]:
    """Runs of the command line in which calls fail; torch is imported once for all of them."""
    with faults.Server(tmp_path_factory.mktemp("runs")) as server:
        yield server


@pytest.fixture(name="load_dcp")
def _load_dcp() -> Callable[[Path], dict[str, torch.Tensor]]:
    return folders.load_dcp
