"""DCPs of other versions of torch and Python: what they add is read past, or named.

The forms are those of torch 2.15 and Python 3.13, and some that a later torch might write; each
test makes them by hand, so that all of them are tried under whatever torch is installed.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import pickletools
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import checkpoints
from support.pickled import Call, Of
from torch.distributed._shard.sharded_tensor import metadata as old
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from llamaconv import RefusedError, Target, convert_checkpoint, make_plan, open_checkpoint
from llamaconv.cli import main
from llamaconv.convert.convert import Conversion
from llamaconv.verify import independent_readers
from llamaconv.verify.verify import verify_checkpoint

Convert = Callable[..., Conversion]
Change = Callable[[Any], Any]
EMBEDDING = "tok_embeddings.weight"
CONTIGUOUS = dcp._MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT


def later(name: str, module: str = dcp.__name__) -> Any:
    """A class that some later torch has in the module of its metadata."""
    return type(name, (), {"__module__": module, "__qualname__": name})


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Any]:
    """Puts a class where the pickler finds it, for as long as something is pickled."""

    def put(kind: Any) -> Any:
        monkeypatch.setattr(sys.modules[kind.__module__], kind.__name__, kind, raising=False)
        return kind

    return put


@pytest.fixture
def step(source: Path, convert: Convert) -> Path:
    """A DCP without a receipt, as a trainer saves it."""
    folder = convert(source, "step", verified=False).target
    (folder / "llamaconv.json").unlink()
    return folder


def change(folder: Path, change: Change) -> Path:
    """Writes the metadata of ``folder`` again, with ``change`` made to torch's own objects."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    changed = change(metadata) or metadata
    (folder / ".metadata").write_bytes(pickle.dumps(changed))
    return folder


def properties(entry: Any, *more: Any, **other: Any) -> None:
    """Gives a tensor the state that a torch writes which has more properties."""
    state = {"dtype": entry.properties.dtype, "memory_format": CONTIGUOUS} | other
    entry.properties = Of(
        dcp.TensorProperties,
        (state["dtype"], torch.strided, False, state["memory_format"], False, *more),
    )


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


def as_torch_2_15(metadata: Any) -> None:
    for entry in metadata.state_dict_metadata.values():
        properties(entry, row_major(entry.size))


def as_torch_2_2(metadata: Any) -> None:
    """The form of torch 2.1 and 2.2: classes in another module, and no fields of the writer."""
    for entry in metadata.state_dict_metadata.values():
        state = (
            entry.properties.dtype,
            torch.strided,
            False,
            old.MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT,
            False,
        )
        entry.properties = Of(old.TensorProperties, state)
    for place in metadata.storage_data.values():
        place.__dict__.pop("transform_descriptors", None)
    for field in ("storage_meta", "version"):
        metadata.__dict__.pop(field, None)


def to_hf(folder: Path, source: Path, target: Path) -> Conversion:
    """Converts with all checks, which read the metadata with torch's own classes."""
    plan = make_plan(open_checkpoint(folder), Target(to="hf", assets=str(source)))
    return convert_checkpoint(plan, target)


def is_converted(folder: Path, source: Path, target: Path) -> bool:
    done = to_hf(folder, source, target)
    assert done.verification
    assert done.verification.ok
    saved = load_file(target / "model.safetensors")
    return saved.keys() == checkpoints.tensors().keys() and all(
        torch.equal(saved[name], one) for name, one in checkpoints.tensors().items()
    )


def unknown(folder: Path) -> list[str]:
    return [str(problem) for problem in open_checkpoint(folder).problems if "later" in str(problem)]


def test_checkpoint_of_torch_2_15_is_read_and_verified(
    source: Path, step: Path, tmp_path: Path
) -> None:
    change(step, as_torch_2_15)
    assert not unknown(step)
    assert is_converted(step, source, tmp_path / "back")


def test_checkpoint_of_torch_2_2_is_read_and_verified(
    source: Path, step: Path, tmp_path: Path
) -> None:
    change(step, as_torch_2_2)
    content = (step / ".metadata").read_bytes()
    assert b"sharded_tensor.metadata" in content
    assert b"storage_meta" not in content
    assert not open_checkpoint(step).problems
    assert is_converted(step, source, tmp_path / "hf")


@pytest.mark.parametrize("strides", [(1, 131), (0, 1), (500, 1), None, torch.Size((64, 1))])
def test_strides_of_the_tensor_that_was_saved_locate_nothing(
    source: Path, step: Path, tmp_path: Path, strides: Any
) -> None:
    """Torch 2.15 keeps those of a view, too, of which it saves a copy; `dcp.load` ignores them."""

    change(step, lambda metadata: properties(metadata.state_dict_metadata[EMBEDDING], strides))
    assert not unknown(step)
    assert is_converted(step, source, tmp_path / "back")


@pytest.mark.parametrize("strides", [(1,), (1, 2, 3), (-1, 1), (1.0, 1), "11", 1, True, (None, 1)])
def test_strides_that_no_tensor_has_are_refused(step: Path, strides: Any) -> None:
    change(step, lambda metadata: properties(metadata.state_dict_metadata[EMBEDDING], strides))
    with pytest.raises(RefusedError, match=rf"{EMBEDDING}.*strides"):
        open_checkpoint(step)


def test_tensor_stored_by_columns_is_refused_by_name(source: Path, tmp_path: Path) -> None:
    state = {"norm.weight": torch.ones(7), "output.weight": torch.arange(12.0).view(3, 4).t()}
    torch.distributed.checkpoint.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    (error,) = open_checkpoint(tmp_path / "dcp").errors
    assert "output.weight" in str(error)
    assert "rows are not contiguous (shape [4, 3], strides [1, 4])" in str(error)


def test_path_of_python_3_13_is_read_and_verified(
    source: Path, step: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("pathlib._local")
    module.PosixPath = later("PosixPath", "pathlib._local")  # type: ignore[attr-defined]

    def with_path(metadata: Any) -> None:
        metadata.storage_meta.checkpoint_id = Call(module.PosixPath, "/", "data", "step-0")

    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "pathlib._local", module)
        change(step, with_path)
    assert b"pathlib._local" in (step / ".metadata").read_bytes()
    assert is_converted(step, source, tmp_path / "back")


@pytest.mark.parametrize("by_name", [False, True])
def test_further_memory_format_is_read_past(
    source: Path,
    step: Path,
    tmp_path: Path,
    by_name: bool,
) -> None:
    """Torch keeps it, and reads it nowhere. By name: as Python 3.11.0 to 3.11.3 writes members."""
    value = (
        Call(getattr, dcp._MEM_FORMAT_ENCODING, "TORCH_CHANNELS_LAST_3D")
        if by_name
        else Call(dcp._MEM_FORMAT_ENCODING, 3)
    )
    change(
        step,
        lambda metadata: properties(
            metadata.state_dict_metadata[EMBEDDING], None, memory_format=value
        ),
    )
    assert is_converted(step, source, tmp_path / "back")


def test_further_bookkeeping_is_read_past(
    source: Path, step: Path, tmp_path: Path, known: Callable[[Any], Any]
) -> None:
    """Fields of the whole checkpoint, and of classes that this torch does not have."""
    cut, kind = known(later("_ShardingPlan")), known(later("_Kind"))

    def add(metadata: Any) -> None:
        metadata.storage_meta.host = Of(cut, {"a": [1], "kind": Call(kind, 3)})
        metadata.saved_with = "2.16.0"

    change(step, add)
    assert not unknown(step)
    assert is_converted(step, source, tmp_path / "back")


@pytest.mark.parametrize("value", [None, False, (), 0, ""])
def test_further_property_without_a_value_is_read_past(
    source: Path, step: Path, tmp_path: Path, value: Any
) -> None:
    change(
        step, lambda metadata: properties(metadata.state_dict_metadata[EMBEDDING], (64, 1), value)
    )
    assert not unknown(step)
    assert is_converted(step, source, tmp_path / "back")


def test_further_fields_with_a_value_are_named(
    source: Path, step: Path, tmp_path: Path, known: Callable[[Any], Any]
) -> None:
    """They may matter: each kind is named once, with its value and whose it is."""
    kind = known(later("_Scaling"))

    def add(metadata: Any) -> None:
        for name, entry in metadata.state_dict_metadata.items():
            properties(entry, row_major(entry.size), "blocked")
            entry.scaling = Of(kind, {}) if name == EMBEDDING else None
            entry.chunks[0].replica = 2
        for place in metadata.storage_data.values():
            place.checksum = "abc"
        metadata.version = "2.0.0"

    change(step, add)
    warned = unknown(step)
    assert len(warned) == 5
    for words in (
        "TensorProperties[7] is 'blocked'",
        f"TensorStorageMetadata.scaling is {dcp.__name__}._Scaling (for {EMBEDDING})",
        "ChunkStorageMetadata.replica is 2",
        "_StorageInfo.checksum is 'abc'",
        "Metadata.version is '2.0.0'",
    ):
        assert sum(words in one for one in warned) == 1, words
    assert all("a torch later than 2.15 may have written it" in one for one in warned)
    assert not any("damaged" in one or "hostile" in one for one in warned)
    assert is_converted(step, source, tmp_path / "back")


def test_tensor_of_an_unknown_class_is_one_problem(
    source: Path, step: Path, known: Callable[[Any], Any]
) -> None:
    kind = known(later("PackedTensorStorageMetadata"))

    def pack(metadata: Any) -> None:
        metadata.state_dict_metadata[EMBEDDING] = Of(kind, {"size": 3})

    change(step, pack)
    errors = make_plan(open_checkpoint(step), Target(assets=str(source))).errors
    assert len(errors) == 1
    assert f"tensor {EMBEDDING}: it is described by a {dcp.__name__}.Packed" in str(errors[0])
    assert "a torch later than 2.15 may have written it" in str(errors[0])


def test_unknown_dtype_matters_only_if_a_weight_has_it(source: Path, step: Path) -> None:
    def four_bits(name: str) -> Change:
        def changed(metadata: Any) -> None:
            entry = metadata.state_dict_metadata[EMBEDDING]
            more = dcp.TensorStorageMetadata(entry.properties, entry.size, entry.chunks)
            properties(more, dtype=torch.float4_e2m1fn_x2)
            metadata.state_dict_metadata[name] = more

        return changed

    change(step, four_bits("optimizer.state.a"))
    assert not make_plan(open_checkpoint(step), Target(assets=str(source))).errors
    change(step, four_bits(EMBEDDING))
    (error,) = make_plan(open_checkpoint(step), Target(assets=str(source))).errors
    assert f"tensor {EMBEDDING}: it is of dtype float4_e2m1fn_x2" in str(error)


@pytest.mark.parametrize(
    "value",
    [
        Call(FileSystemWriter, "folder"),
        Call(FileSystemWriter, 3, 4),
        Call(torch.float4_e2m1fn_x2.__class__, 3),
        Call(torch.load, "file"),
        Call(print, 3),
    ],
)
def test_what_no_version_of_torch_writes_is_refused(step: Path, value: Any) -> None:
    """A class is made as Python makes a dataclass or a member, and no function is called."""

    def add(metadata: Any) -> None:
        metadata.storage_meta.host = value

    change(step, add)
    with pytest.raises(RefusedError, match="damaged or hostile"):
        open_checkpoint(step)


# What we write.


def test_metadata_has_the_bytes_that_every_torch_reads(source: Path, convert: Convert) -> None:
    """One digest for all: CI runs this under the oldest and the newest torch and Python."""
    content = (convert(source, shards=2, verified=False).target / ".metadata").read_bytes()
    operations = list(pickletools.genops(content))
    assert operations[0][1] == 4, "protocol 4, which Python 3.8 reads"
    words = {argument for _, argument, _ in operations if isinstance(argument, str)}
    assert not any("pathlib" in word or "strides" in word for word in words)
    assert not any(str(source.parent) in word for word in words)
    found = hashlib.sha256(content).hexdigest()
    assert found == "9f31758ec0253aea8c7164405bbc4faf6cfd73201d94b81528c064a6b51e87fb"


def test_metadata_has_five_properties(source: Path, convert: Convert) -> None:
    """Torch up to 2.14 takes exactly five."""
    content = (convert(source, verified=False).target / ".metadata").read_bytes()

    class Five:
        def __setstate__(self, state: Any) -> None:
            dtype, layout, requires_grad, memory_format, pin_memory = state
            assert (dtype, layout, requires_grad) == (torch.bfloat16, torch.strided, False)
            assert (memory_format, pin_memory) == (CONTIGUOUS, False)

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            return Five if name == "TensorProperties" else super().find_class(module, name)

    loaded = Unpickler(io.BytesIO(content)).load()
    assert len(loaded.state_dict_metadata) == len(open_checkpoint(source).tensors)


# Whatever a reader raises.


class OddError(Exception):
    """Of no class that anybody catches by name."""


ODD = [OddError, TypeError, AssertionError, AttributeError, ImportError, KeyError, RecursionError]


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("phase", ["bits", "logits"])
def test_no_exception_of_a_reader_is_a_traceback(
    source: Path,
    tmp_path: Path,
    kind: type[Exception],
    phase: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the first pass over both sides, and in the forward pass that follows it."""
    real, n_calls = independent_readers.SafetensorsReader._slice, 0
    n_in_bits = sum(1 for _ in open_checkpoint(source).tensors)

    def fails(self: Any, *arguments: Any) -> Any:
        nonlocal n_calls
        n_calls += 1
        if phase == "bits" or n_calls > n_in_bits:
            raise kind("out of order\nand a second line")
        return real(self, *arguments)

    monkeypatch.setattr(independent_readers.SafetensorsReader, "_slice", fails)
    target = tmp_path / "target"
    assert main(["convert", str(source), str(target), "--quiet"]) == 1
    said = capsys.readouterr().err
    assert not target.exists()
    assert f"check {phase} failed: {source}: cannot be read by the safetensors library" in said
    assert kind.__name__ in said
    assert "Traceback" not in said
    assert "\nand a second line" not in said


def test_a_reader_that_cannot_open_metadata_is_named(
    source: Path, convert: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(folder: Path) -> Any:
        raise ModuleNotFoundError("No module named 'pathlib._nowhere'")

    target = convert(source, verified=False).target
    monkeypatch.setattr(independent_readers, "unpickle_metadata", fails)
    verification = verify_checkpoint(target, source=source)
    assert not verification.ok
    failed = verification.checks[1]
    assert f"{target}: cannot be read by torch.distributed.checkpoint" in failed.detail
    assert "No module named 'pathlib._nowhere'" in failed.detail
