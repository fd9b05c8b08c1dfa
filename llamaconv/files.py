"""Reading small files that strangers made: JSON with bounds, and what a file really is."""

from __future__ import annotations

import errno
import json
import stat
from pathlib import Path
from typing import Any

from llamaconv.problems import Problem, RefusedError, or_problems

# Far above any index or configuration in use (405B: 1,138 tensors, 100 kB).
_MOST_JSON_BYTES = 100_000_000


def what_it_is(start: bytes) -> str | None:
    """A guess at why a file is not what its name says, from its first bytes, or None."""
    if not start:
        return "the file is empty"
    if start.startswith(b"version https://git-lfs"):
        return "this is a Git-LFS pointer, not the weights; fetch them with 'git lfs pull'"
    head = start[:512].lstrip().lower()
    if head.startswith((b"<!doctype html", b"<html")):
        return (
            "this is an HTML page, not the file; the download failed (a gated model needs a login)"
        )
    if start.startswith(b"PK\x03\x04"):
        return "this is a zip archive, as torch.save writes"
    return None


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object. Raises `RefusedError` that names the file and what it is instead."""
    try:
        check_is_file(path)
        check_json_size(path, path.stat().st_size)
        content = path.read_bytes()
    except OSError as error:
        raise RefusedError(f"{path}: {error.strerror or error}") from error
    return json_object(path, content)


def check_is_file(path: Path) -> None:
    """Raises ``OSError`` where reading ``path`` might never end: a pipe, a device, or a link to one."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # a folder fails by itself
        raise OSError(errno.EINVAL, "is not a file", str(path))


def check_json_size(path: object, n_bytes: int) -> None:
    """Raises `RefusedError` where a file is too long to be an index or a configuration."""
    if n_bytes > _MOST_JSON_BYTES:
        raise RefusedError(f"{path}: {n_bytes} bytes; no index or configuration is that long")


def json_object(path: object, content: bytes) -> dict[str, Any]:
    """The JSON object that ``content`` is. Raises `RefusedError` that names ``path``."""
    try:
        entries = json.loads(content, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        reason = what_it_is(content[:512]) or f"not valid JSON: {error}"
        raise RefusedError(f"{path}: {reason}") from error
    if not isinstance(entries, dict):
        raise RefusedError(f"{path}: a JSON object was expected, {type(entries).__name__} found")
    return entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"{twice[0]!r} is there twice")
    return entries


def parse_json(text: bytes) -> Any:
    """JSON in which no name may stand twice. Raises ``ValueError``."""
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def try_json(path: Path, problems: list[Problem]) -> dict[str, Any] | None:
    """`read_json`, with a refusal added to ``problems`` instead of raised."""
    return or_problems(lambda: read_json(path), problems)
