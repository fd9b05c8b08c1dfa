"""Fixtures that most tests share: a source folder, and converting it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import checkpoints
import faults
import pytest
import torch

from llamaconv import Target, convert_checkpoint, make_plan, open_checkpoint
from llamaconv.convert import Conversion


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


def load_dcp(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a DCP through torch's own reader, with the dtypes that are stored."""
    from torch.distributed.checkpoint import FileSystemReader, load

    metadata = FileSystemReader(folder).read_metadata()
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.state_dict_metadata.items()
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled")
        load(state, checkpoint_id=folder, no_dist=True)
    return state


@pytest.fixture(name="load_dcp")
def _load_dcp() -> Callable[[Path], dict[str, torch.Tensor]]:
    return load_dcp
