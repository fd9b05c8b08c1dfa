"""The receipt, ``llamaconv.json`` in the target: where the weights came from and what was done.

It states what the weights do not contain (RoPE's base and scaling, the layout of the rows) and has
a digest of every piece, so that a folder can be understood and checked months later.
"""

from __future__ import annotations

import reprlib
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from llamaconv.checkpoint.untrusted.files import read_json
from llamaconv.model.names import Layout
from llamaconv.model.params import LlamaParams
from llamaconv.report.errors import Problem, RefusedError, collect_problems
from llamaconv.report.tables import Table

if TYPE_CHECKING:
    from llamaconv.checkpoint.folder import Folder

NAME = "llamaconv.json"
_VERSION = 1


@dataclass(frozen=True)
class SourceRecord:
    """Where the weights came from.

    Attributes:
        path: The folder, resolved; or the repository of the Hub at its commit.
        format: "huggingface", "meta", "dcp" or "torch_checkpointing".
        rope: The layout of its q and k rows.
        assets: The folder that config.json and the tokenizer came from, if there was one.
        files: Bytes of each file that held tensors, by its name.
    """

    path: str
    format: str
    rope: Layout
    assets: str | None
    files: dict[str, Any]


@dataclass(frozen=True)
class TargetRecord:
    """The options of the conversion, as `Target` has them, with ``rope`` as it was written."""

    to: str
    generation: str
    rope: Layout
    dtype: str
    shards: int
    max_shard_size: int
    assets: str
    tie: str
    with_optimizer: bool = False


@dataclass(frozen=True)
class TensorRecord:
    """One tensor that was written; ``digests`` are the xxh3-128 of each chunk's bytes.

    Roles that are stored together have one record each, with the digests of the whole tensor.
    """

    source: str
    target: str
    operation: str
    dtype: str
    shape: tuple[int, ...]
    digests: tuple[str, ...]


@dataclass(frozen=True)
class ValueRecord:
    """One entry of a trainer's state that was copied as it lies: its bytes, and their xxh3-128."""

    source: str
    target: str
    nbytes: int
    digest: str


@dataclass(frozen=True)
class DroppedRecord:
    """One source tensor that was left out, and why."""

    source: str
    reason: str


@dataclass(frozen=True)
class CheckRecord:
    """One check, as `Check.to_json` has it."""

    name: str
    ok: bool
    value: Any = None
    yardstick: Any = None
    detail: Any = ""


@dataclass(frozen=True)
class VerdictRecord:
    """The checks that were run when the target was written."""

    ok: bool
    checks: tuple[CheckRecord, ...]


@dataclass(frozen=True, repr=False)
class Receipt:
    """What a conversion did.

    Attributes:
        created: The time, in ISO 8601.
        source: Where the weights came from.
        target: The options of the conversion.
        params: The model's parameters.
        versions: Of llamaconv, torch, safetensors and Python.
        verified: The checks after writing; None if they were not run.
        dropped: The source tensors that were left out.
        tensors: The tensors that were written, an optimizer's too.
        values: The other entries of a trainer's state.
    """

    created: str
    source: SourceRecord
    target: TargetRecord
    params: LlamaParams
    versions: dict[str, Any]
    verified: VerdictRecord | None
    dropped: tuple[DroppedRecord, ...]
    tensors: tuple[TensorRecord, ...]
    values: tuple[ValueRecord, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the entries of ``llamaconv.json``."""
        return {
            "llamaconv_receipt": _VERSION,
            **{one.name: _plain(getattr(self, one.name)) for one in fields(self)},
            "params": self.params.to_json(),
        }

    def __repr__(self) -> str:
        return str(self.table())

    def table(self) -> Table:
        """Return the receipt without its long lists."""
        verdict = "not run" if self.verified is None else "passed" if self.verified.ok else "FAILED"
        digest = next((digest for one in self.tensors for digest in one.digests), "")
        generation = f" {self.target.generation}" if self.target.to == "dcp" else ""
        rows = [
            ("source", f"{Path(self.source.path).name} ({self.source.format})"),
            ("rows of q and k", f"{self.source.rope} → {self.target.rope}"),
            ("target", f"{self.target.to}{generation}"),
            ("model", str(self.params)),
            ("tensors", f"{len(self.tensors)} written, {len(self.dropped)} dropped"),
            ("first digest (xxh3-128)", digest),
            ("checks", verdict),
        ]
        return Table(("receipt", NAME), rows)

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def try_read(folder: Path, problems: list[Problem]) -> Receipt | None:
    """Do what `read` does; if it refuses, return None and add to ``problems``."""
    return collect_problems(lambda: read(folder), problems)


def try_read_in(folder: Folder, problems: list[Problem]) -> Receipt | None:
    """Return the receipt in ``folder``; if there is none, or it is refused, return None.

    What is wrong is added to ``problems``.
    """
    if not folder.is_file(NAME):
        return None
    return collect_problems(lambda: from_json(folder.path / NAME, folder.read_json(NAME)), problems)


def read(folder: Path) -> Receipt | None:
    """Return the receipt in ``folder``; None if there is no receipt.

    Raises:
        RefusedError: It is damaged, or of another version.
    """
    path = folder / NAME
    return from_json(path, read_json(path)) if path.is_file() else None


def from_json(path: object, entries: dict[str, Any]) -> Receipt:
    """Return the receipt whose ``entries`` the file ``path`` holds.

    Raises:
        RefusedError: It is damaged, or of another version.
    """
    try:
        if entries["llamaconv_receipt"] != _VERSION:
            raise ValueError(f"expected version {_VERSION}, found {entries['llamaconv_receipt']!r}")
        found = _as(Receipt, entries)
        assert isinstance(found, Receipt)
        if unknown := sorted(entries["target"].keys() - vars(found.target).keys()):
            raise ValueError(f"target/{unknown[0]} is not a known option")
        return found
    except (KeyError, TypeError, ValueError) as error:
        raise RefusedError(
            f"{path}: not a receipt that this version of llamaconv can read "
            f"({type(error).__name__}: {error}). Move it away to read the folder without it"
        ) from error


def _plain(value: Any) -> Any:
    """Return ``value`` for JSON: records become objects, tuples become lists."""
    if is_dataclass(value) and not isinstance(value, type):
        return {one.name: _plain(getattr(value, one.name)) for one in fields(value)}
    return [_plain(one) for one in value] if isinstance(value, tuple) else value


_WORDS: dict[Any, str] = {
    str: "text",
    int: "a whole number",
    bool: "true or false",
    dict: "an object",
    list: "a list",
}


def _as(kind: Any, value: Any, where: str = "") -> Any:
    """Return ``value`` as the annotation ``kind`` describes it.

    Raises:
        ValueError: It is something else. The message names the entry, as a path from the top.
    """
    origin, inside = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin is UnionType:  # X | None
        return None if value is None else _as(inside[0], value, where)
    if origin is Literal:
        if value not in inside:
            raise ValueError(
                f"{where} must be one of {', '.join(inside)}; got {reprlib.repr(value)}"
            )
        return value
    expected = {tuple: list}.get(origin, origin) or (dict if is_dataclass(kind) else kind)
    if type(value) is not expected:  # not isinstance: true is not a number
        raise ValueError(f"{where} must be {_WORDS[expected]}; got {reprlib.repr(value)}")
    if origin is tuple:
        return tuple(_as(inside[0], one, f"{where}/{number}") for number, one in enumerate(value))
    if kind is LlamaParams:
        return LlamaParams.from_json(value)
    if not isinstance(kind, type) or not is_dataclass(kind):
        return value
    hints, prefix = _hints(kind), f"{where}/" if where else ""
    found = {}
    for one in fields(kind):
        if one.name in value:
            found[one.name] = _as(hints[one.name], value[one.name], prefix + one.name)
        elif one.default is MISSING:
            raise ValueError(f"{prefix}{one.name} is missing")
    return kind(**found)


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)
