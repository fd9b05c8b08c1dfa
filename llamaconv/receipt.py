"""The receipt, ``llamaconv.json`` in the target: where the weights came from and what was done.

It carries what no weight does (RoPE's base and scaling, the layout of the rows) and a digest
of every piece, so that a folder can be understood and checked months later.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llamaconv.files import read_json
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
        digest = self.tensors[0]["digests"][0] if self.tensors else ""
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
    with open(folder / NAME, "w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        # After a power failure a target without it would not know how its rows lie.
        os.fsync(file.fileno())


def try_read(folder: Path, problems: list[Problem]) -> Receipt | None:
    """`read`, with a refusal added to ``problems`` instead of raised."""
    return or_problems(lambda: read(folder), problems)


def read(folder: Path) -> Receipt | None:
    """The receipt in ``folder``, None where there is none. Raises `RefusedError` if damaged."""
    path = folder / NAME
    return from_json(path, read_json(path)) if path.is_file() else None


# By example: an object has at least these entries, each item of a list is like the only one here,
# and in a tuple are the alternatives.
_LIKE: dict[str, Any] = {
    "source": {"path": "", "format": "", "rope": "", "files": {}},
    "target": {"to": "", "generation": "", "rope": ""},
    "params": {},
    "tensors": [
        {"source": "", "target": "", "operation": "", "dtype": "", "shape": [0], "digests": [""]}
    ],
    "dropped": [{"source": "", "reason": ""}],
    "versions": {},
    "created": "",
    "verified": (None, {"ok": True, "checks": [{"name": "", "ok": True}]}),
}


def _is_like(value: Any, example: Any) -> bool:
    if isinstance(example, tuple):
        return any(_is_like(value, one) for one in example)
    if isinstance(example, dict):
        return isinstance(value, dict) and all(
            name in value and _is_like(value[name], inner) for name, inner in example.items()
        )
    if isinstance(example, list):
        return isinstance(value, list) and all(_is_like(one, example[0]) for one in value)
    return type(value) is type(example)


def from_json(path: object, entries: dict[str, Any]) -> Receipt:
    """The receipt that ``entries`` of the file ``path`` are. Raises `RefusedError` if damaged."""
    # Whoever reads one later need not ask again what kind of value stands where.
    try:
        if entries["llamaconv_receipt"] != _VERSION:
            raise ValueError(f"version {entries['llamaconv_receipt']!r}, {_VERSION} expected")
        for name, example in _LIKE.items():
            if not _is_like(entries[name], example):
                raise ValueError(f"{name} is not what it should be")
        if not isinstance(entries["source"].get("assets"), str | None):
            raise ValueError(f"assets is {entries['source']['assets']!r}")
        if entries["target"]["rope"] not in ("interleaved", "half_split"):
            raise ValueError(f"rope {entries['target']['rope']!r}")
        return Receipt(
            **{name: entries[name] for name in _LIKE}
            | {"params": LlamaParams.from_json(entries["params"])},
        )
    except (KeyError, TypeError, ValueError) as error:
        raise RefusedError(
            f"{path}: not a receipt that this llamaconv reads ({type(error).__name__}: {error}); "
            "move it away to have the folder read without it"
        ) from error
