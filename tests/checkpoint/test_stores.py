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
from llamaconv.checkpoint.store_errors import explain
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


def test_address_without_a_bucket_is_refused() -> None:
    for text in ("s3://", "gs:///"):
        with pytest.raises(RefusedError, match="names no bucket"):
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
        ("sftp://me:p@secret@host/m", "sftp://***@host/m"),
        ("abfs://box@host/m?sv=1&sig=secret", "abfs://box@host/m?***"),
    ],
)
def test_password_in_an_address_is_never_shown(url: str, shown: str) -> None:
    address = path_or_address(url)
    assert isinstance(address, StoreAddress)
    assert str(address) == shown
    assert "secret" not in repr(address)
    assert address.hide(f"no answer from {url}") == f"no answer from {shown}"


# Errors of drivers, by the names that those of Google's and Azure's have too.


def error(name: str, base: type[Exception] = Exception, text: str = "said", **values: Any) -> Any:
    """An error of a class of this name, as a driver raises it."""
    made = type(name, (base,), {})(text)
    for key, value in values.items():
        setattr(made, key, value)
    return made


@pytest.mark.parametrize(
    ("raised", "says", "is_transient"),
    [
        (error("NoCredentialsError"), "no credentials", False),
        (error("DefaultCredentialsError"), "no credentials", False),
        (ValueError("Must provide either a connection_string or account_name"), "no cred", False),
        (error("ClientAuthenticationError", error_code="AuthenticationFailed"), "rejects", False),
        (error("HttpError", code=403), "access denied", False),
        (PermissionError("Forbidden"), "access denied", False),
        (error("HttpError", code=404), "not found", False),
        (FileNotFoundError("The specified bucket does not exist"), "no such bucket", False),
        (error("ResourceNotFoundError", error_code="ContainerNotFound"), "no such bucket", False),
        (OSError(28, "No space left on device"), "the store is full", False),
        (error("ClientError", response={"Error": {"Code": "QuotaExceeded"}}), "is full", False),
        (error("ClientError", response={"Error": {"Code": "InvalidRange"}}), "shorter", False),
        (error("HttpError", code=429), "limits the rate", True),
        (error("ClientError", response={"Error": {"Code": "SlowDown"}}), "limits the rate", True),
        (error("ReadTimeoutError"), "no answer in time", True),
        (TimeoutError(), "no answer in time", True),
        (error("HttpResponseError", status_code=502), "server error", True),
        (error("ClientPayloadError"), "it was cut", True),
        (ConnectionResetError("reset"), "it was cut", True),
        (KeyError("x"), "KeyError", False),
    ],
    ids=str,
)
def test_errors_of_drivers_become_one_line(
    raised: Exception, says: str, is_transient: bool
) -> None:
    reason = explain(raised, StoreAddress("gs://bucket/m"))
    assert says in reason.text and "\n" not in reason.text
    assert reason.is_transient is is_transient


def test_errors_do_not_quote_a_password() -> None:
    address = StoreAddress("sftp://me:secret@host/m")
    reason = explain(ConnectionError("cannot reach sftp://me:secret@host"), address)
    assert "secret" not in reason.text and "***" in reason.text


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
