"""Check that all ranks do the same conversion: the same source, plan and request.

Every rank opens the source by itself, and on several hosts one of them may see another folder under
the same path, or none. The ranks compare names and lengths of the source's files, a sample of each
(not times, which network filesystems report differently), and the whole plan.

Limit: a difference inside the files is found only by the checks after writing, when each rank
compares what another one wrote with the source as it sees it.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import xxhash

from llamaconv import __version__
from llamaconv.checkpoint.trainer_state import MadeValue, StoredValue
from llamaconv.plan.plan import Plan
from llamaconv.ranks import Ranks
from llamaconv.report.errors import Problem, RefusedError

_SAMPLE_BYTES = 64 << 10


def agree(plan: Plan, request: dict[str, Any], ranks: Ranks) -> None:
    """Compare this rank's conversion with those of the others.

    Args:
        plan: This rank's plan.
        request: The options that are not in the plan, as JSON values.
        ranks: All ranks.

    Raises:
        RefusedError: A rank differs from rank 0; the same error on every rank.
    """
    if ranks.size == 1:
        return
    files = _remote_files(plan) or {file.name: _known(file) for file in plan.source.local_files}
    first, *others = ranks.all_gather(_view(plan, request, files))
    problems = []
    for topic, known in first.items():
        different = [rank for rank, view in enumerate(others, 1) if view[topic] != known]
        if different:
            detail = _difference(known, others[different[0] - 1][topic])
            whose = f"rank {', '.join(map(str, different))} and rank 0"
            problems.append(Problem(f"{whose} do not agree on {topic}{detail}"))
    if problems:
        hint = "give every rank the same command, and a source that every host sees"
        raise RefusedError([*problems[:-1], Problem(f"{problems[-1].message}; {hint}")])


def fingerprint(plan: Plan) -> str:
    """Return a fingerprint of the conversion.

    Runs with equal fingerprints write the same bytes, so one can resume the other.
    """
    states: dict[str, Any] = _remote_files(plan) or {
        str(file.resolve()): state for file, state in plan.source.seen.items()
    }
    view = _view(plan, {"torch": version("torch")}, states)
    return xxhash.xxh3_128_hexdigest(json.dumps(view, sort_keys=True).encode())


def _view(plan: Plan, request: dict[str, Any], files: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what must be equal, by topic. Folders may have other paths on other hosts."""
    tensors = plan.source.tensors
    target = {name: value for name, value in asdict(plan.target).items() if name != "assets"}
    rows = [
        [
            *(move.source, move.target, move.operation, move.dtype, move.shape, move.heads),
            tensors[move.source].dtype,
            [
                (p.file.name, p.offset, p.start, p.shape, *p.strides)
                for p in tensors[move.source].pieces
            ],
        ]
        for move in (*plan.moves, *plan.state_moves)
    ]
    rows += [[copy.target, copy.source.name, _place(copy.source)] for copy in plan.values]
    return {
        "the version of llamaconv": {"version": __version__},
        "the request": {**target, **request},
        "the source's files": files,
        "the model": plan.params.to_json() if plan.params else {},
        "the plan": {
            "moves": len(rows),
            "digest": xxhash.xxh3_128_hexdigest(json.dumps(rows).encode()),
        },
    }


def _place(value: StoredValue | MadeValue) -> list[Any]:
    """Return where an entry lies, or what it is if it lies nowhere."""
    if isinstance(value, MadeValue):
        return [value.value]
    return [value.file.name, value.offset, value.length]


def _remote_files(plan: Plan) -> dict[str, Any]:
    """Return the versions of the files of weights that are not here; {} if they are."""
    remote = plan.source.remote
    return {name: remote.version_of(name) for name in plan.source.file_bytes} if remote else {}


def _known(file: Path) -> str:
    """Return the length and a digest of the last bytes."""
    with file.open("rb") as opened:
        length = opened.seek(0, 2)
        opened.seek(max(0, length - _SAMPLE_BYTES))
        return f"{length:,} bytes, ending in {xxhash.xxh3_64_hexdigest(opened.read())}"


def _difference(known: dict[str, Any], other: dict[str, Any]) -> str:
    """Return the first difference, in parentheses."""
    for name in {**known, **other}:
        if known.get(name) != other.get(name):
            return f" ({name}: {other.get(name, 'missing')} and {known.get(name, 'missing')})"
    return ""
