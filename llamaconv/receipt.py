"""The receipt, ``llamaconv.json`` in the target: where the weights came from and what was done.

It carries what no weight does (RoPE's base and scaling, the layout of the rows) and a digest
of every piece, so that a folder can be understood and checked months later.
"""

from __future__ import annotations

import json
import reprlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llamaconv.files import read_json, write_text
from llamaconv.params import LlamaParams
from llamaconv.problems import Problem, RefusedError, or_problems
from llamaconv.tables import Table

NAME = "llamaconv.json"
_VERSION = 1


@dataclass(frozen=True, repr=False)
class Receipt:
    """What a conversion did.

    ``source`` has ``path``, ``format``, ``rope``, ``files`` (name to bytes) and ``assets``, the
    folder that config.json and tokenizer came from, or None; ``target`` the
    target's options; ``tensors`` one entry a tensor written: ``source``, ``target``,
    ``operation``, ``dtype``, ``shape`` and ``digests``, the xxh3-128 of each row chunk's bytes.
    ``verified`` holds the checks, None where they were not run.
    """

    source: dict[str, Any]
    target: dict[str, Any]
    params: LlamaParams
    tensors: list[dict[str, Any]]
    dropped: list[dict[str, Any]]
    versions: dict[str, str]
    created: str
    verified: dict[str, Any] | None = field(default=None)

    def to_json(self) -> dict[str, Any]:
        return {
            "llamaconv_receipt": _VERSION,
            "created": self.created,
            "source": self.source,
            "target": self.target,
            "params": self.params.to_json(),
            "versions": self.versions,
            "verified": self.verified,
            "dropped": self.dropped,
            "tensors": self.tensors,
        }

    def __repr__(self) -> str:
        return str(self.table())

    def table(self) -> Table:
        """The receipt without its long lists."""
        verdict = (
            "not run" if self.verified is None else "passed" if self.verified["ok"] else "FAILED"
        )
        digest = next((digest for one in self.tensors for digest in one["digests"]), "")
        rows = [
            ("source", f"{Path(self.source['path']).name} ({self.source['format']})"),
            ("rows of q and k", f"{self.source['rope']} → {self.target['rope']}"),
            ("target", f"{self.target['to']} {self.target['generation']}"),
            ("model", str(self.params)),
            ("tensors", f"{len(self.tensors)} written, {len(self.dropped)} dropped"),
            ("first digest (xxh3-128)", digest),
            ("checks", verdict),
        ]
        return Table(("receipt", NAME), rows)

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def write(folder: Path, receipt: Receipt) -> None:
    text = json.dumps(receipt.to_json(), indent=1, ensure_ascii=True)
    write_text(folder / NAME, text + "\n")


def try_read(folder: Path, problems: list[Problem]) -> Receipt | None:
    """`read`, with a refusal added to ``problems`` instead of raised."""
    return or_problems(lambda: read(folder), problems)


def read(folder: Path) -> Receipt | None:
    """The receipt in ``folder``, None where there is none. Raises `RefusedError` if damaged."""
    path = folder / NAME
    return from_json(path, read_json(path)) if path.is_file() else None


# What a receipt consists of: types, objects by the names that they must have, lists by their one
# kind of entry. A tuple of one stands for what may be null.
_ENTRIES: dict[str, Any] = {
    "created": str,
    "source": {"path": str, "format": str, "rope": str, "assets": (str,), "files": {}},
    "target": {
        **dict.fromkeys(("to", "generation", "rope", "dtype", "assets", "tie"), str),
        **dict.fromkeys(("shards", "max_shard_size"), int),
    },
    "params": {},
    "versions": {},
    "verified": ({"ok": bool, "checks": [{"name": str, "ok": bool}]},),
    "dropped": [dict.fromkeys(("source", "reason"), str)],
    "tensors": [
        {
            **dict.fromkeys(("source", "target", "operation", "dtype"), str),
            "shape": [int],
            "digests": [str],
        }
    ],
}
_WORDS: dict[type, str] = {
    str: "text",
    int: "a whole number",
    bool: "true or false",
    dict: "an object",
    list: "a list",
}


def _check(value: Any, wanted: Any, where: str = "") -> None:
    """Raises ``ValueError`` that names the entry where ``value`` is not as ``wanted`` says."""
    if isinstance(wanted, tuple):
        if value is None:
            return
        wanted = wanted[0]
    kind: type = wanted if isinstance(wanted, type) else type(wanted)
    found: type = type(value)  # not isinstance: true is no number
    if found is not kind:
        raise ValueError(f"{where[1:]} is {reprlib.repr(value)}; {_WORDS[kind]} was expected")
    if isinstance(wanted, dict):
        if absent := sorted(wanted.keys() - value.keys()):
            raise ValueError(f"{where[1:]}/{absent[0]} is absent".lstrip("/"))
        for name, inside in wanted.items():
            _check(value[name], inside, f"{where}/{name}")
    elif isinstance(wanted, list):
        for number, inside in enumerate(value):
            _check(inside, wanted[0], f"{where}/{number}")


def from_json(path: object, entries: dict[str, Any]) -> Receipt:
    """The receipt that ``entries`` of the file ``path`` are. Raises `RefusedError` if damaged."""
    # Whoever reads one later need not ask again what kind of value stands where.
    try:
        if entries["llamaconv_receipt"] != _VERSION:
            raise ValueError(f"version {entries['llamaconv_receipt']!r}, {_VERSION} expected")
        _check(entries, _ENTRIES)
        for side in ("source", "target"):
            if entries[side]["rope"] not in ("interleaved", "half_split"):
                raise ValueError(f"{side}/rope is {entries[side]['rope']!r}")
        return Receipt(
            params=LlamaParams.from_json(entries["params"]),
            **{name: entries[name] for name in _ENTRIES if name != "params"},
        )
    except (KeyError, TypeError, ValueError) as error:
        raise RefusedError(
            f"{path}: not a receipt that this llamaconv reads ({type(error).__name__}: {error}); "
            "move it away to have the folder read without it"
        ) from error
