"""Addresses of stores, and checkpoints that are opened in them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from llamaconv import RefusedError, Target, convert_checkpoint, make_plan, open_checkpoint
from llamaconv.checkpoint.address import path_or_address
from llamaconv.checkpoint.open import open_store_folder
from llamaconv.checkpoint.store_address import StoreAddress
from llamaconv.checkpoint.store_folder import StoreFolder


@pytest.fixture
def memory() -> Iterator[Any]:
    """fsspec's store in memory, empty."""
    fs = fsspec.filesystem("memory")
    for each in (False, True):
        fs.store.clear()
        fs.pseudo_dirs[:] = [""]
        if not each:
            yield fs


# Addresses.


@pytest.mark.parametrize(
    "text",
    [
        *("s3://bucket/a/b", "gs://bucket/m", "az://box/m", "abfs://box@host/m", "memory://m"),
        "hf://buckets/org/name/folder",
    ],
)
def test_address_of_a_store_is_one(text: str) -> None:
    found = path_or_address(text)
    assert isinstance(found, StoreAddress)
    assert str(found) == text
    assert str(path_or_address(f"{text}/")) == text


@pytest.mark.parametrize(
    "text", ["http://host/m", "https://host/m", "file:///m", "nowhere://m", "zip://a::s3://b/c"]
)
def test_other_addresses_are_refused(text: str) -> None:
    with pytest.raises(RefusedError, match="neither read nor written"):
        path_or_address(text)


def test_parts_of_an_address() -> None:
    address = StoreAddress("s3://bucket/a/b")
    assert (address.name, str(address.parent), str(address / "c")) == (
        "b",
        "s3://bucket/a",
        "s3://bucket/a/b/c",
    )
    assert str(StoreAddress("s3://bucket").parent) == "s3://bucket"
    assert address.scheme == "s3"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("sftp://me:secret@host/m", "sftp://***@host/m"),
        ("abfs://box@host/m?sv=1&sig=secret", "abfs://box@host/m?***"),
    ],
)
def test_password_in_an_address_is_never_shown(url: str, shown: str) -> None:
    address = path_or_address(url)
    assert isinstance(address, StoreAddress)
    assert str(address) == shown
    assert "secret" not in repr(address)
    assert address.hide(f"no answer from {url}") == f"no answer from {shown}"


# What is opened.


@pytest.mark.parametrize(("to", "shards"), [("hf", 1), ("dcp", 3), ("meta", 2)])
def test_checkpoint_in_a_store_opens_as_its_copy_here(
    memory: Any, source: Path, tmp_path: Path, to: str, shards: int
) -> None:
    target = Target(to=to, shards=shards)  # type: ignore[arg-type]
    convert_checkpoint(make_plan(open_checkpoint(source), target), tmp_path / "t", verified=False)
    memory.put(str(tmp_path / "t"), "/box/t", recursive=True)
    here, there = open_checkpoint(tmp_path / "t"), open_checkpoint("memory://box/t")
    assert not there.problems
    assert (there.format, there.naming, there.params) == (here.format, here.naming, here.params)
    assert there.receipt == here.receipt
    assert {name: _places(tensor) for name, tensor in there.tensors.items()} == {
        name: _places(tensor) for name, tensor in here.tensors.items()
    }


def _places(tensor: Any) -> Any:
    pieces = [(one.file.name, one.offset, one.start, one.shape) for one in tensor.pieces]
    return tensor.dtype, tensor.shape, pieces


def test_overlay_supplies_files_that_are_not_in_the_store(
    memory: Any, source: Path, tmp_path: Path
) -> None:
    convert_checkpoint(make_plan(open_checkpoint(source)), tmp_path / "t", verified=False)
    memory.put(str(tmp_path / "t"), "/box/t", recursive=True)
    memory.rm("/box/t/.metadata")
    with pytest.raises(RefusedError, match=r"no .metadata"):
        open_checkpoint("memory://box/t")
    overlay = {".metadata": (tmp_path / "t" / ".metadata").read_bytes()}
    found = open_store_folder(StoreFolder(StoreAddress("memory://box/t"), overlay))
    assert not found.problems and found.format == "dcp"
    assert found.tensors.keys() == open_checkpoint(tmp_path / "t").tensors.keys()


def test_replaced_file_is_noticed(memory: Any, source: Path) -> None:
    memory.put(str(source), "/box/m", recursive=True)
    found = open_checkpoint("memory://box/m")
    assert not found.changed()
    name = next(iter(found.file_bytes))
    memory.pipe(f"/box/m/{name}", (source / name).read_bytes())
    memory.rm("/box/m/config.json")
    assert sorted(problem.message for problem in found.changed()) == sorted(
        f"memory://box/m/{file}: {what} since it was opened; open the source again when nothing "
        "writes to it"
        for file, what in ((name, "replaced"), ("config.json", "deleted"))
    )


@pytest.mark.parametrize("inside", ["", "checkpoint/"])
def test_newest_complete_step_of_a_run_is_taken(
    memory: Any, source: Path, tmp_path: Path, inside: str
) -> None:
    convert_checkpoint(make_plan(open_checkpoint(source)), tmp_path / "t", verified=False)
    for step in (9, 10):
        memory.put(str(tmp_path / "t"), f"/box/run/{inside}step-{step}", recursive=True)
    memory.pipe(f"/box/run/{inside}step-11/__0_0.distcp", b"being written")
    found = open_checkpoint("memory://box/run")
    assert str(found.path) == f"memory://box/run/{inside}step-10"
    assert found.problems[0].message.startswith("memory://box/run: a run; its newest complete")
    assert not found.errors


def test_nothing_there_is_refused(memory: Any) -> None:
    with pytest.raises(RefusedError, match="memory://box/none: not found"):
        open_checkpoint("memory://box/none")
