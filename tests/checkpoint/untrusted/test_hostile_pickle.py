"""Pickles and archives of strangers: `.metadata`, `.distcp`, `.pth` and `.bin` are read as data.

Each payload that would run is shown to be live: Python's own unpickler runs the same bytes.
"""

from __future__ import annotations

import copyreg
import io
import os
import pickle
import random
import struct
import subprocess
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from support import hostile
from support.pickled import Call, Of
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from llamaconv import RefusedError, make_plan, open_checkpoint
from llamaconv.checkpoint.reader import PieceReader
from llamaconv.checkpoint.torch_rows import read_rows
from llamaconv.checkpoint.untrusted import pickle_data
from llamaconv.verify.independent_readers import DcpReader, load_dcp

NAME = "norm.weight"


def called(module: str, name: str, *arguments: Any) -> bytes:
    """A pickle of protocol 4 that calls a function by any name, dots and all."""
    words = b"".join(b"\x8c" + bytes([len(word)]) + word.encode() for word in (module, name))
    given = pickle.dumps(arguments, 4)
    return b"\x80\x04" + words + b"\x93" + given[2:-1] + b"R."


def runs(trace: Path) -> dict[str, bytes]:
    """Pickles that each leave ``trace`` when they are opened as pickles are."""
    command, code = f"touch '{trace}'", f"open({str(trace)!r}, 'w')"
    path = trace
    found: dict[str, bytes] = {
        f"os.system, protocol {protocol}": pickle.dumps(Call(os.system, command), protocol)
        for protocol in range(6)
    }
    found |= {
        "eval": called("builtins", "eval", code),
        "exec": called("builtins", "exec", code),
        "subprocess": called("subprocess", "getoutput", command),
        "posix": called("posix", "system", command),
        "pydoc": called("pydoc", "pipepager", "", command),
        "cProfile": called("cProfile", "run", code),
        "a pickle in a pickle": called("pickle", "loads", pickle.dumps(Call(os.system, command))),
        "torch's own runner": called("torch.utils.collect_env", "run", command),
        "torch.jit": called("torch.jit.unsupported_tensor_ops", "execWrapper", code, {}, {}),
        "torch.hub": called("torch.hub", "os.system", command),
        "torch with dots": called("torch", "serialization.os.system", command),
        "torch.serialization with dots": called("torch.serialization", "os.system", command),
        "an admitted module with dots": called(dcp.__name__, "os.system", command),
        "a method of an admitted class": called("pathlib", "PosixPath.touch", path),
        "a method of its base": called("pathlib", "Path.touch", path),
        "operator": pickle.dumps(Call(exec, code)),
        "by INST": b"(S'" + command.encode().replace(b"'", b'"') + b"'\nios\nsystem\n.",
        "by OBJ": b"(cos\nsystem\nS'" + command.encode().replace(b"'", b'"') + b"'\no.",
        "by EXT1": b"\x80\x02\x82\xf0X"
        + struct.pack("<I", len(command))
        + command.encode()
        + b"\x85R.",
        "as a key": pickle.dumps({1: {Call(os.system, command): 1}}),
        "in a list": pickle.dumps([[Call(os.system, command)]]),
        "in the arguments of an admitted class": pickle.dumps(
            Call(torch.Size, Call(list, Call(bytes, Call(os.system, command))))
        ),
        "in the state of an admitted class": pickle.dumps(
            Of(dcp.Metadata, {"a": Call(os.system, command)})
        ),
        "after what is whole": pickle.dumps(
            [dcp.Metadata({}, storage_data={}), Call(os.system, command)]
        ),
    }
    return found


@pytest.fixture(scope="module", autouse=True)
def extension() -> Any:
    """What EXT1 stands for is whatever a process has registered."""
    copyreg.add_extension("os", "system", 0xF0)
    yield
    copyreg.remove_extension("os", "system", 0xF0)


PAYLOADS = list(runs(Path("trace")))


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return tmp_path / "trace"


@pytest.mark.parametrize("payload", PAYLOADS)
def test_metadata_payload_never_runs(tmp_path: Path, trace: Path, payload: str) -> None:
    content = runs(trace)[payload]
    folder = tmp_path / "dcp"
    folder.mkdir()
    (folder / ".metadata").write_bytes(content)
    assert ".metadata" in hostile.refusal(folder)
    hostile.convert(folder)
    assert not trace.exists()
    try_live(lambda: pickle.loads(content))
    assert trace.exists(), "the payload is dead, so the test says nothing"


def try_live(run: Callable[[], object]) -> None:
    """A payload may fail after it ran."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            run()
        except Exception as error:
            print(type(error).__name__, error)


def test_metadata_replaced_after_opening_is_not_given_to_torch(tmp_path: Path, trace: Path) -> None:
    opened = open_checkpoint(write(tmp_path / "dcp"))
    tensors = list(opened.tensors.values())
    assert load_dcp(DcpReader(tmp_path / "dcp"), tensors)[NAME].tolist() == [1, 1]
    (tmp_path / "dcp" / ".metadata").write_bytes(runs(trace)["os.system, protocol 4"])
    with pytest.raises(RefusedError, match="asks for posix"):
        load_dcp(DcpReader(tmp_path / "dcp"), tensors)
    assert not trace.exists()


@pytest.mark.parametrize("target", [dcp.Metadata, type(Path())])
def test_pickle_cannot_set_class_attributes(tmp_path: Path, target: type) -> None:
    where = f"{target.__module__}\n{target.__name__}\n".encode()
    content = b"\x80\x02c" + where + b"N}X\x06\x00\x00\x00markedK\x01s\x86b."
    (tmp_path / ".metadata").write_bytes(content)
    assert "sets the state" in hostile.refusal(tmp_path)
    assert not hasattr(target, "marked")
    try:
        pickle.loads(content)
        assert target.marked == 1, "the payload is dead"  # type: ignore[attr-defined]
    finally:
        del target.marked  # type: ignore[attr-defined]


# A whole checkpoint of one tensor, and each of its values replaced.


def saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def properties(*state: Any) -> Any:
    return Of(dcp.TensorProperties, state)


def of(kind: type, **state: Any) -> Any:
    return Of(kind, state)


FILE = "__0_0.distcp"
ENCODING = dcp._MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT


def write(folder: Path, entry: bytes | None = None, **changes: Any) -> Path:
    """A DCP with one tensor of two elements; ``changes`` replace a value of the metadata."""
    folder.mkdir(exist_ok=True)
    entry = saved(torch.ones(2)) if entry is None else entry
    (folder / FILE).write_bytes(entry)
    size = torch.Size([2])
    values: dict[str, Any] = {
        "name": NAME,
        "size": size,
        "offsets": torch.Size([0]),
        "sizes": size,
        "properties": properties(torch.float32, torch.strided, False, ENCODING, False),
        "relative_path": FILE,
        "offset": 0,
        "length": len(entry),
        "index": dcp.MetadataIndex(NAME, [0], 0),
    } | changes
    chunk = of(dcp.ChunkStorageMetadata, offsets=values["offsets"], sizes=values["sizes"])
    tensor = of(
        dcp.TensorStorageMetadata,
        properties=values["properties"],
        size=values["size"],
        chunks=values.get("chunks", [chunk]),
    )
    keys = ("relative_path", "offset", "length", "transform_descriptors")
    place = of(_StorageInfo, **{key: values[key] for key in keys if key in values})
    metadata = of(
        dcp.Metadata,
        state_dict_metadata=values.get("entries", {values["name"]: values.get("tensor", tensor)}),
        planner_data=values.get("planner_data"),
        storage_data=values.get("places", {values["index"]: values.get("place", place)}),
        storage_meta=dcp.StorageMeta(checkpoint_id=Path("/tmp/a")),
        version="1.0.0",
    )
    (folder / ".metadata").write_bytes(pickle.dumps(metadata, values.get("protocol")))
    return folder


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_metadata_builder_of_these_tests_writes_readable_files(
    tmp_path: Path, protocol: int
) -> None:
    opened = open_checkpoint(write(tmp_path / "dcp", protocol=protocol))
    assert not opened.errors
    with PieceReader() as reader:
        assert read_rows(reader, opened.tensors[NAME], 0, 2).tolist() == [1, 1]


DAMAGED = "not the metadata of a checkpoint"
NOT_WHOLE = [-1, -(2**70), 2**63, 2**70, True, 1.0, "1", None, [1], b"1", Call(torch.Size, (1,))]
CHANGES: list[tuple[dict[str, Any], str]] = [
    *(({key: value}, DAMAGED) for key in ("offset", "length") for value in NOT_WHOLE),
    *(
        ({"relative_path": value}, DAMAGED)
        for value in ("../x", "/etc/passwd", "a/b", "..", ".", "", "a\0", "a\\b", 3, None, b"x", [])
    ),
    *(
        ({key: Call(torch.Size, (value,))}, DAMAGED)
        for key in ("offsets", "sizes", "size")
        for value in NOT_WHOLE
    ),
    *(
        ({key: value}, DAMAGED)
        for key in ("offsets", "sizes", "size")
        for value in (None, 2, "2", [2], Call(torch.Size, (1,), (1,)), (1,) * 65, (2, 2), ())
        if (key, value) != ("offsets", ())
    ),
    ({"offsets": (2**61,)}, "is in no file"),
    ({"size": (2**61,)}, "elements"),
    ({"offsets": (1,), "index": dcp.MetadataIndex(NAME, [1])}, "reaches beyond"),
    ({"sizes": (1,)}, "holds [2] float32, the metadata says [1] float32"),
    *(({"chunks": value}, DAMAGED) for value in (None, {}, (), "x", 3, [3], [None], [{}])),
    ({"chunks": []}, "elements"),
    *(
        ({"name": value, "index": dcp.MetadataIndex("a", [0])}, DAMAGED)
        for value in (3, b"a", None)
    ),
    *(({"index": value}, DAMAGED) for value in (NAME, 3, None, (NAME, 0))),
    *(({"index": of(dcp.MetadataIndex, fqn=value)}, DAMAGED) for value in (3, None, [], (1,))),
    ({"index": of(dcp.MetadataIndex, fqn=NAME, offset="0")}, DAMAGED),
    ({"index": of(dcp.MetadataIndex, fqn=NAME)}, "is in no file"),
    *(({key: value}, DAMAGED) for key in ("entries", "places") for value in (None, [], 3, "x")),
    ({"entries": {}, "places": {}}, "no tensor of a model"),
    ({"places": {}}, "is in no file"),
    *(({"tensor": value}, DAMAGED) for value in (None, 3, [], {}, torch.float32, (1, 2))),
    ({"tensor": Call(dcp.TensorStorageMetadata, 1, 2, 3)}, DAMAGED),
    *(({"place": value}, DAMAGED) for value in (None, 3, [], {}, ("x", 0, 1))),
    ({"place": Call(_StorageInfo, FILE, 0, 1)}, DAMAGED),
    ({"transform_descriptors": ["zstd"]}, "compressed or encrypted"),
    *(({"properties": value}, DAMAGED) for value in (None, 3, {}, torch.float32)),
    *(
        ({"properties": properties(*value)}, DAMAGED)
        for value in (
            *((), (1,), (1, 2, 3, 4, 5), (torch.float32,), (torch.float32,) * 6, (None,) * 5),
            (torch.float32, torch.strided, False, 0, False),
            (torch.float32, torch.strided, False, None, False),
            (torch.float32, torch.strided, False, [ENCODING], False),
            (torch.float32, torch.strided, False, getattr, False),
            (torch.strided, torch.strided, False, ENCODING, False),
            ("float32", torch.strided, False, ENCODING, False),
        )
    ),
    *(
        ({"properties": properties(dtype, torch.strided, False, ENCODING, False)}, words)
        for dtype, words in (
            (torch.qint8, "asks for torch.qint8"),
            (torch.float16, "says [2] float16"),
        )
    ),
    ({"length": 10}, "cannot be read"),
    ({"offset": 1}, "__0_0.distcp: cut to 1577 of"),
    ({"offset": 2**61}, "__0_0.distcp: cut to 1577 of"),
    ({"relative_path": "absent.distcp"}, "absent.distcp: not found"),
    ({"planner_data": {(1, 2): 3}}, "neither a text nor a number"),
    ({"planner_data": {frozenset([1]): 3}}, "operation"),
]


def test_unknown_memory_format_is_refused(tmp_path: Path) -> None:
    """An enumeration's members cannot be made wrong, its pickle can."""
    member = Call(dcp._MEM_FORMAT_ENCODING, 0)
    folder = write(tmp_path / "dcp", properties=memory_format(member))
    good = (folder / ".metadata").read_bytes()
    at = good.index(b"_MEM_FORMAT_ENCODING")
    call = good.index(b"K\x00\x85", at)
    for wrong in (b"K\x07\x85", b"K\xff\x85", b"N\x85"):
        content = good[:call] + wrong + good[call + 3 :]
        (folder / ".metadata").write_bytes(content)
        assert DAMAGED in hostile.refusal(folder)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("member", list(dcp._MEM_FORMAT_ENCODING))
def test_enum_members_pickled_by_python_3_11_0_to_3_11_3_are_read(
    tmp_path: Path, member: Any, protocol: int
) -> None:
    """Debian 12 has 3.11.2."""
    written = Call(getattr, dcp._MEM_FORMAT_ENCODING, member.name)
    folder = write(tmp_path / "dcp", protocol=protocol, properties=memory_format(written))
    assert not open_checkpoint(folder).errors


def memory_format(value: Any) -> Any:
    return properties(torch.float32, torch.strided, False, value, False)


GOT = Call(getattr, dcp._MEM_FORMAT_ENCODING, "TORCH_CONTIGUOUS_FORMAT")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        *(
            (Call(getattr, *arguments), "builtins.getattr")
            for arguments in (
                (dcp._MEM_FORMAT_ENCODING, "__class__"),
                (dcp._MEM_FORMAT_ENCODING, "TORCH_CONTIGUOUS_FORMAT.__class__"),
                (dcp._MEM_FORMAT_ENCODING, "TORCH_CONTIGUOUS_FORMAT", None),
                (dcp._MEM_FORMAT_ENCODING,),
                (),
                (Path, "home"),
                (dcp.Metadata, "TORCH_CONTIGUOUS_FORMAT"),
                (GOT, "value"),
                (getattr, "TORCH_CONTIGUOUS_FORMAT"),
                ("a", "b"),
            )
        ),
        # A member is torch's own, for all that this process does later.
        (Call(getattr, *GOT.reduced[1], state={"_value_": 1}), DAMAGED),
        (Call(dcp._MEM_FORMAT_ENCODING, 0, state={"_value_": 1}), DAMAGED),
    ],
)
@pytest.mark.parametrize("where", ["properties", "planner_data"])
def test_getattr_in_a_pickle_reads_only_memory_formats(
    tmp_path: Path, value: Any, words: str, where: str
) -> None:
    placed = memory_format(value) if where == "properties" else [value]
    assert words in hostile.refusal(write(tmp_path / "dcp", **{where: placed}))
    assert [member.value for member in dcp._MEM_FORMAT_ENCODING] == [0, 1, 2]


@pytest.mark.parametrize(("changes", "words"), CHANGES, ids=range(len(CHANGES)))
def test_invalid_value_of_metadata_is_refused(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    assert words in hostile.refusal(write(tmp_path / "dcp", **changes))


@pytest.mark.parametrize("kind", ["pipe", "/dev/zero", "/etc/passwd", "folder"])
def test_entry_outside_the_files_of_the_checkpoint_is_refused(tmp_path: Path, kind: str) -> None:
    folder = write(tmp_path / "dcp", length=100)
    hostile.put(folder / FILE, kind)
    assert FILE in hostile.refusal(folder)


ENTRIES: list[tuple[Any, str]] = [
    (torch.ones(3), "holds [3] float32"),
    (torch.ones(2).half(), "holds [2] float16"),
    ({"a": torch.ones(2)}, "expected a tensor, found dict"),
    ([torch.ones(2)], "expected a tensor, found list"),
    (None, "expected a tensor, found NoneType"),
    (torch.ones(4)[::2], "not contiguous"),
    (torch.ones(1).expand(2), "not contiguous"),
    (torch.ones(2).to_sparse(), "asks for torch._utils._rebuild_sparse_tensor"),
    (torch.ones(2, device="meta"), "asks for torch._utils._rebuild_meta_tensor_no_storage"),
]


@pytest.mark.parametrize(("value", "words"), ENTRIES, ids=range(len(ENTRIES)))
def test_dcp_entry_with_another_object_is_refused(tmp_path: Path, value: Any, words: str) -> None:
    said = hostile.refusal(write(tmp_path / "dcp", saved(value)))
    assert words.removeprefix("asks for ") in said


@pytest.mark.parametrize("payload", PAYLOADS)
def test_entry_payload_never_runs(tmp_path: Path, trace: Path, payload: str) -> None:
    entry = archive({"data.pkl": runs(trace)[payload]})
    folder = write(tmp_path / "dcp", entry)
    assert "cannot be read" in hostile.refusal(folder)
    assert not trace.exists()
    try_live(lambda: torch.load(io.BytesIO(entry), weights_only=False))
    if "EXT1" not in payload:  # torch's pickle module for files has the registry, too, but not here
        assert trace.exists(), "the payload is dead, so the test says nothing"


# Archives of torch.save.


def archive(
    records: dict[str, bytes], compressed: tuple[str, ...] = (), top: str = "archive", **fields: int
) -> bytes:
    """A zip as torch reads it; ``fields`` are changed in the directory's last record."""
    stream = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(stream, "w") as made:
        warnings.simplefilter("ignore")
        for name, content in {"version": b"3\n", "byteorder": b"little", **records}.items():
            kind = zipfile.ZIP_DEFLATED if name in compressed else zipfile.ZIP_STORED
            made.writestr(f"{top}/{name}", content, kind)
        for field, value in fields.items():
            setattr(made.filelist[-1], field, value)
    return stream.getvalue()


def tensor(
    storage: str = "FloatStorage",
    key: Any = "0",
    stored: Any = 2,
    first: Any = 0,
    shape: Any = (2,),
    strides: Any = (1,),
    word: Any = "storage",
) -> bytes:
    """A pickle of ``{"norm.weight": tensor}`` as torch writes it, with any of its values replaced."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return value.reduced if isinstance(value, Storage) else None

    class Storage:
        reduced = (word, getattr(torch, storage), key, "cpu", stored)

    stream = io.BytesIO()
    made = Call(
        torch._utils._rebuild_tensor_v2, Storage(), first, shape, strides, False, OrderedDict()
    )  # type: ignore[attr-defined]
    Pickler(stream, 2).dump({NAME: made})
    return stream.getvalue()


TENSORS: list[tuple[dict[str, Any], str]] = [
    ({"shape": (2**40,), "strides": (0,)}, "not contiguous"),
    ({"shape": (2**30, 2**30), "strides": (0, 0)}, "not contiguous"),
    ({"shape": (2**40,)}, "bytes of its storage are needed"),
    ({"shape": (2**40,), "stored": 2**40}, "bytes of its storage are needed"),
    ({"shape": (2**62, 4), "strides": (4, 1)}, "bytes of its storage are needed"),
    ({"shape": (-1,)}, "whole numbers"),
    ({"shape": (True,)}, "whole numbers"),
    ({"shape": (2.0,)}, "whole numbers"),
    ({"shape": ("2",)}, "whole numbers"),
    ({"shape": 2}, "whole numbers"),
    ({"shape": [2]}, "whole numbers"),
    ({"shape": (2**64,), "strides": (1,)}, "whole numbers"),
    ({"shape": (1,) * 65, "strides": (1,) * 65}, "65 dimensions"),
    ({"shape": (2, 1)}, "as torch describes"),
    ({"strides": (-1,)}, "whole numbers"),
    ({"strides": (2**62,)}, "not contiguous"),
    ({"strides": ()}, "as torch describes"),
    ({"strides": None}, "whole numbers"),
    ({"first": 1}, "bytes of its storage are needed"),
    ({"first": 2**62}, "bytes of its storage are needed"),
    ({"first": -1}, "whole numbers"),
    ({"first": True}, "whole numbers"),
    ({"first": 0.0}, "whole numbers"),
    ({"first": "0"}, "whole numbers"),
    ({"stored": 1}, "bytes of its storage are needed"),
    ({"stored": 3}, "bytes of its storage are needed"),
    ({"stored": -2}, "whole numbers"),
    ({"stored": "2"}, "whole numbers"),
    ({"storage": "DoubleStorage"}, "bytes of its storage are needed"),
    ({"key": "1"}, "is not in the file"),
    ({"key": "../data.pkl"}, "is not in the file"),
    ({"key": "/etc/passwd"}, "is not in the file"),
    ({"key": [[]]}, "is not in the file"),
    ({"key": 10**600}, "is not in the file"),
    ({"word": "module"}, "as torch describes"),
    ({"word": None}, "as torch describes"),
]


def write_pth(folder: Path, content: bytes, name: str = "consolidated.00.pth") -> Path:
    hostile.meta(folder)
    (folder / "consolidated.00.pth").unlink()
    (folder / name).write_bytes(content)
    return folder


def test_torch_file_builder_of_these_tests_writes_readable_files(tmp_path: Path) -> None:
    data = torch.tensor([3.0, 4.0]).numpy().tobytes()
    content = archive({"data.pkl": tensor(), "data/0": data})
    opened = open_checkpoint(write_pth(tmp_path / "meta", content))
    with PieceReader() as reader:
        assert read_rows(reader, opened.tensors[NAME], 0, 2).tolist() == [3, 4]
    assert torch.load(io.BytesIO(content))[NAME].tolist() == [3, 4]


@pytest.mark.parametrize(("changes", "words"), TENSORS, ids=range(len(TENSORS)))
def test_tensor_with_a_wrong_location_is_refused(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    content = archive({"data.pkl": tensor(**changes), "data/0": bytes(8)})
    for name in ("consolidated.00.pth", "pytorch_model.bin"):
        said = hostile.refusal(write_pth(tmp_path / name, content, name))
        assert f"{name}: {NAME}: " in said
        assert words in said


GOOD = {"data.pkl": tensor(), "data/0": bytes(8)}


def overlapping() -> bytes:
    """Two records of the directory at one place of the file."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as made:
        for name, content in {**GOOD, "data/1": bytes(8)}.items():
            made.writestr(f"archive/{name}", content)
        made.filelist[-1].header_offset = made.filelist[-2].header_offset
    return stream.getvalue()


def twice() -> bytes:
    stream = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(stream, "w") as made:
        warnings.simplefilter("ignore")
        for name, content in [*GOOD.items(), ("data/0", bytes(8))]:
            made.writestr(f"archive/{name}", content)
    return stream.getvalue()


def quantised() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch means to take them away
        return torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)


WHOLE = archive(GOOD)
ARCHIVES: dict[str, tuple[bytes, str]] = {
    "data.pkl deflated": (archive(GOOD, ("data.pkl",)), "is compressed"),
    "a storage deflated": (archive(GOOD, ("data/0",)), "is compressed"),
    "the version deflated": (archive(GOOD, ("version",)), "is compressed"),
    "encrypted": (archive(GOOD, flag_bits=1), "is compressed"),
    "other lengths": (archive(GOOD, file_size=9), "is compressed"),
    "beyond the file": (archive(GOOD, file_size=2**40, compress_size=2**40), "is damaged"),
    "at no place": (archive(GOOD, header_offset=2**40), "ends early"),
    "over one another": (overlapping(), "is not where its directory says"),
    "a name twice": (twice(), "appears twice"),
    "two pickles": (
        archive({**GOOD, "../archive2/data.pkl": b"x", "x/data.pkl": b"y"}),
        "has no data.pkl",
    ),
    "no pickle": (archive({"a": b""}), "has no data.pkl"),
    "another byte order": (archive({**GOOD, "byteorder": b"big"}), "byteorder is b'big'"),
    "a long byte order": (archive({**GOOD, "byteorder": bytes(99)}), "more than 16"),
    "an end after the end": (WHOLE + b"PK\x05\x06", "does not end as an archive does"),
    "something after it": (WHOLE + bytes(100), "does not end as an archive does"),
    "cut": (WHOLE[: len(WHOLE) // 2], "does not end as an archive does"),
    "a start alone": (WHOLE[:30], "cut or damaged"),
    "an empty pickle": (archive({"data.pkl": b"", "data/0": bytes(8)}), "cut or damaged"),
    "a list": (
        archive({"data.pkl": pickle.dumps([1], 2)}),
        "expected a dict of tensors, found list",
    ),
    "a tensor": (saved(torch.ones(2)), "expected a dict of tensors, found torch._utils"),
    "numbers for names": (saved({1: torch.ones(2)}), "a tensor's name is not text but int"),
    "a number for a weight": (saved({NAME: 3}), f"{NAME}: expected a tensor, found int"),
    "numbers only": (saved({"a": 3}), "no tensors in it, only 'a' (int)"),
    "pairs for names": (saved({(1, 2): torch.ones(2)}), "neither a text nor a number"),
    "sparse": (saved({"a": torch.ones(2).to_sparse()}), "_rebuild_sparse_tensor"),
    "quantised": (
        saved({"a": quantised()}),
        "_rebuild_qtensor",
    ),
    "on no device": (saved({"a": torch.ones(2, device="meta")}), "_rebuild_meta_tensor_no_storage"),
    "complex": (saved({"a": torch.ones(2, dtype=torch.complex128)}), "torch.ComplexDoubleStorage"),
    "a module": (saved(torch.nn.Linear(2, 2)), "asks for torch.nn.modules.linear.Linear"),
    "a bytearray of 4 EB": (
        archive({"data.pkl": called("builtins", "bytearray", 2**62)}),
        "asks for builtins.bytearray",
    ),
    "nothing": (b"", "the file is empty"),
    "a page": (b"<!doctype html>", "this is an HTML page"),
}


@pytest.mark.parametrize("attack", ARCHIVES)
def test_invalid_archive_is_refused(tmp_path: Path, attack: str) -> None:
    content, words = ARCHIVES[attack]
    for name in ("consolidated.00.pth", "pytorch_model.bin"):
        said = hostile.refusal(write_pth(tmp_path / name, content, name))
        assert name in said
        assert words in said
    hostile.convert(tmp_path / name)


def test_tensor_subclass_is_refused_by_name(tmp_path: Path) -> None:
    made = torch.ones(2).as_subclass(Subclass)
    assert "asks for torch._tensor._rebuild_from_type_v2" in hostile.refusal(
        write_pth(tmp_path / "meta", saved({"a": made}))
    )


class Subclass(torch.Tensor):
    pass


def test_plain_tensors_saved_by_torch_are_read(tmp_path: Path) -> None:
    one = torch.arange(6.0).view(2, 3)
    state: dict[str, Any] = OrderedDict(
        a=one,
        again=one,
        rows=one[1:],
        parameter=torch.nn.Parameter(torch.ones(2)),
        new=torch.ones(2, dtype=torch.uint16),
        eight=torch.ones(2).to(torch.float8_e4m3fn),
        yes=torch.tensor([True]),
        scalar=torch.tensor(3.0),
        none=torch.zeros(0, 3),
        thin=torch.ones(4, 4)[:, :1].contiguous().t(),
    )
    state._metadata = OrderedDict(version=1)  # type: ignore[attr-defined]
    for protocol in (2, 3, 4, 5):
        torch.save(state, tmp_path / "pytorch_model.bin", pickle_protocol=protocol)
        opened = open_checkpoint(tmp_path / "pytorch_model.bin")
        assert [p for p in opened.errors if "pytorch_model.bin" in str(p)] == []
        with PieceReader() as reader:
            for name, tensor in state.items():
                found = read_rows(reader, opened.tensors[name], 0, opened.tensors[name].n_rows)
                assert found.dtype == tensor.dtype
                assert torch.equal(found.view(tensor.shape), tensor), name


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("name", ["consolidated.00.pth", "pytorch_model.bin"])
def test_torch_file_payload_never_runs(
    tmp_path: Path, trace: Path, payload: str, name: str
) -> None:
    content = archive({"data.pkl": runs(trace)[payload]})
    folder = write_pth(tmp_path / "hostile", content, name)
    assert name in hostile.refusal(folder)
    assert not trace.exists()
    try_live(lambda: torch.load(folder / name, weights_only=False))
    if "EXT1" not in payload:
        assert trace.exists(), "the payload is dead, so the test says nothing"


def test_format_before_torch_1_6_is_refused(tmp_path: Path, trace: Path) -> None:
    folder = write_pth(tmp_path / "hostile", b"")
    file = folder / "consolidated.00.pth"
    made = {"a": Call(os.system, f"touch '{trace}'")}
    torch.save(made, file, _use_new_zipfile_serialization=False)
    assert "not a file of torch.save since torch 1.6" in hostile.refusal(folder)
    assert not trace.exists()
    torch.load(file, weights_only=False)
    assert trace.exists()


# What memory and time are bounded by.


def sparse_archive(path: Path) -> None:
    """50 GB on no disk that end as an archive whose directory is all of them."""
    n_bytes = 50_000_000_000
    with open(path, "wb") as file:
        file.write(b"PK\x03\x04")
        file.truncate(n_bytes)
        file.seek(n_bytes - 98)
        end = struct.pack(
            "<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, 2**40, 2**40, n_bytes - 98, 0
        )
        locator = struct.pack("<4sIQI", b"PK\6\7", 0, n_bytes - 98, 1)
        last = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 2**32 - 1, 2**32 - 1, 0)
        file.write(end + locator + last)


def bombs() -> dict[str, bytes]:
    """Pickles that take Python's own unpickler all memory or all time, or crash it."""
    # A tuple of the one before twice, 200 times, and then a key: its hash takes for ever.
    doubled = b"".join(b"h%c\x86q%c" % (n, n + 1) for n in range(200))
    return {
        "hash": b"\x80\x02}K\x01\x85q\x00" + doubled + b"K\x01s.",
        "deep-key": b"\x80\x02}K\x01" + b"\x85" * 300_000 + b"K\x01s.",
        "deep-list": b"\x80\x02" + b"]" * 300_000 + b"a" * 299_999 + b".",
        "deep-tuple": b"\x80\x02)" + b"\x85" * 300_000 + b".",
        "memo": b"\x80\x02Nr\xff\xff\xff\x7f.",
        "memo-in-order": b"\x80\x04N" + b"\x94" * 1_000_000 + b".",
        "unicode": b"\x80\x04\x8d" + (2**40).to_bytes(8, "little") + b".",
        "text": b"\x80\x02X\xff\xff\xff\xff.",
        "bytes": b"\x80\x04\x8e" + (2**40).to_bytes(8, "little") + b".",
        "bytearray": b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b".",
        "long": b"\x80\x02\x8b\xff\xff\xff\x7f.",
        "frame": b"\x80\x04\x95" + b"\xff" * 8 + b"N.",
        "line": b"\x80\x02c" + b"x" * 1_000_000,
        "endless": b"\x80\x02" + b"]" * 300_000,
        "marks": b"\x80\x02" + b"(" * 1_000_000,
    }


@pytest.mark.thorough
def test_bombs_of_pickles_and_zips_are_refused_in_bounded_memory_and_time(tmp_path: Path) -> None:
    folders = []
    for name, content in bombs().items():
        (tmp_path / name).mkdir()
        (tmp_path / name / ".metadata").write_bytes(content)
        folders.append(tmp_path / name)
    # The same reader has both.
    for name in ("hash", "memo", "unicode"):
        content = archive({"data.pkl": bombs()[name]})
        folders.append(write_pth(tmp_path / f"{name}-pth", content))
    zeros = tmp_path / "zeros"
    zeros.mkdir()
    with open(zeros / ".metadata", "wb") as file:
        file.truncate(1_000_000_000)
    large = tmp_path / "large"
    large.mkdir()
    with open(large / ".metadata", "wb") as file:
        file.truncate(50_000_000_000)
    deflated = archive({**GOOD, "data.pkl": bytes(300_000_000)}, ("data.pkl",))
    assert len(deflated) < 1_000_000
    folders += [zeros, large, write_pth(tmp_path / "deflated", deflated)]
    sparse_archive(write_pth(tmp_path / "sparse", b"") / "consolidated.00.pth")
    folders.append(tmp_path / "sparse")
    refused = hostile.bounded(*folders)
    assert all(refused), [
        folder.name for folder, said in zip(folders, refused, strict=True) if not said
    ]
    assert not any("Error" in said for said in refused)


@pytest.mark.thorough
def test_norms_of_any_length_are_compared_in_bounded_memory(tmp_path: Path) -> None:
    """Two files on no disk, whose norms claim 500 MB."""
    folder = write_pth(tmp_path / "meta", b"")
    n = 62_500_000
    for number in range(2):
        path = folder / f"consolidated.0{number}.pth"
        with open(path, "wb") as file, zipfile.ZipFile(file, "w") as made:
            made.writestr("archive/data.pkl", tensor("DoubleStorage", stored=n, shape=(n,)))
            info = zipfile.ZipInfo("archive/data/0")
            with made.open(info, "w", force_zip64=True) as record:
                record.write(b"")
            info.file_size = info.compress_size = 8 * n
            file.seek(8 * n, os.SEEK_CUR)
            made.start_dir = file.tell()
    assert "missing" in hostile.bounded(folder)[0]


# Whatever bytes are changed, the outcome is a refusal or a checkpoint.


@pytest.mark.parametrize(
    "seed", [*range(30), *(pytest.param(n, marks=pytest.mark.thorough) for n in range(30, 300))]
)
def test_random_damage_never_crashes(tmp_path: Path, seed: int) -> None:
    random_ = random.Random(seed)
    folder = write(tmp_path / "dcp")
    files = [folder / ".metadata", folder / FILE]
    for path in (write_pth(tmp_path / "meta", saved({NAME: torch.ones(2)})), folder):
        files = [path / "consolidated.00.pth"] if path != folder else files
        for file in files:
            content = bytearray(file.read_bytes())
            for _ in range(random_.choice((1, 1, 2, 8))):
                at = random_.randrange(len(content))
                content[at] = random_.choice(
                    (0, 1, 0x28, 0x52, 0x62, 0x7F, 0x80, 0xFF, content[at] ^ 1)
                )
            file.write_bytes(content)
            with suppress(RefusedError):
                make_plan(open_checkpoint(path))


@pytest.mark.thorough
def test_bombs_exhaust_pythons_own_unpickler() -> None:
    """What Python's own unpickler makes of two of them, with little memory and time."""
    for name in ("memo", "deep-key"):
        code = (
            "import pickle, resource, sys; resource.setrlimit(resource.RLIMIT_AS, (2 << 30,) * 2)\n"
            "pickle.loads(sys.stdin.buffer.read())"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], input=bombs()[name], capture_output=True
        )
        assert done.returncode != 0, name


def test_pickle_reader_alone_survives_random_damage() -> None:
    admitted = {"torch.Size"}
    value = {
        "a": [1, -1, 70000, 2**40, -(2**40), 1.5, True, False, None, "\u00e9", b"x", (1, (2,))]
    }
    for protocol in (3, 4, 5):
        assert pickle_data.read(pickle.dumps(value, protocol), admitted) == value
    made = pickle_data.read(pickle.dumps(torch.Size([3])), admitted)
    assert (made.name, made.args) == ("torch.Size", ((3,),))
    assert pickle_data.read(pickle.dumps(OrderedDict(a=1)), {"collections.OrderedDict"}) == {"a": 1}
    with pytest.raises(pickle_data.ForbiddenNameError, match=r"torch\.Size"):
        pickle_data.read(pickle.dumps(torch.Size([3])), set())
