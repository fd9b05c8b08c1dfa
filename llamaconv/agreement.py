"""Whether all ranks mean the same conversion: the same source, the same plan, the same request.

Every rank opens the source by itself, and on several hosts one of them may see another folder
under the same path, or none. Compared are names and lengths of the source's files and a sample of
each (not times, which network filesystems differ in), and everything that the plan says.

Limit: a source that differs inside its files alone is left to the checks after the writing; there
every rank compares what another one wrote with the source as it sees it.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import xxhash

from llamaconv.plan import Plan
from llamaconv.problems import Problem, RefusedError
from llamaconv.ranks import Ranks
from llamaconv.version import __version__

_SAMPLE_BYTES = 64 << 10


def agree(plan: Plan, request: dict[str, Any], ranks: Ranks) -> None:
    """Raises the same `RefusedError` on every rank where one differs from rank 0, and in what.

    ``request`` is what else was asked for, as JSON can carry it.
    """
    if ranks.size == 1:
        return
    files = {file.name: _known(file) for file in plan.source.local_files}
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
    """Equal for conversions that write the same bytes: what an unfinished one left can be used."""
    states = {str(file.resolve()): state for file, state in plan.source.seen.items()}
    view = _view(plan, {"torch": version("torch")}, states)
    return xxhash.xxh3_128_hexdigest(json.dumps(view, sort_keys=True).encode())


def _view(plan: Plan, request: dict[str, Any], files: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What has to be the same, by topic. Folders may have another path on another host."""
    tensors = plan.source.tensors
    target = {name: value for name, value in asdict(plan.target).items() if name != "assets"}
    rows = [
        [
            *(move.source, move.target, move.operation, move.dtype, move.shape, move.heads),
            tensors[move.source].dtype,
            [(p.file.name, p.offset, p.start, p.shape) for p in tensors[move.source].pieces],
        ]
        for move in plan.moves
    ]
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


def _known(file: Path) -> str:
    """Length and a digest of the last bytes; raises ``OSError``."""
    with open(file, "rb") as opened:
        length = opened.seek(0, 2)
        opened.seek(max(0, length - _SAMPLE_BYTES))
        return f"{length:,} bytes, ending in {xxhash.xxh3_64_hexdigest(opened.read())}"


def _difference(known: dict[str, Any], other: dict[str, Any]) -> str:
    """The first thing that differs."""
    for name in {**known, **other}:
        if known.get(name) != other.get(name):
            return f" ({name}: {other.get(name, 'not there')} and {known.get(name, 'not there')})"
    return ""
