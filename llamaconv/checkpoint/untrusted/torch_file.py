"""One file of ``torch.save``, opened for the names, shapes and offsets of its tensors only.

Nothing in it runs, and no tensor is created (see `torch_archive`).
"""

from __future__ import annotations

import re
from typing import Any

from llamaconv.checkpoint.tensors import Location, Piece, TensorInfo
from llamaconv.checkpoint.untrusted.files import ByteSource, what_it_is
from llamaconv.checkpoint.untrusted.pickle_data import ForbiddenNameError, UnknownFormError
from llamaconv.checkpoint.untrusted.torch_archive import Archive, is_tensor, kind_of
from llamaconv.report.errors import Problem, explained, first_few, warning


def read_torch_header(
    path: Location, source: ByteSource
) -> tuple[dict[str, TensorInfo], list[Problem]]:
    """Return the tensors of one ``.pth`` or ``.bin`` file, and every problem found.

    Args:
        path: The file, for messages and pieces.
        source: Its bytes.

    Raises:
        OSError: It cannot be read.
    """

    def no_tensors(reason: str) -> tuple[dict[str, TensorInfo], list[Problem]]:
        return {}, [Problem(f"{path}: {reason}", (path.name,))]

    try:
        start = source.read(0, 512)
        if not start.startswith(b"PK\x03\x04"):
            return no_tensors(
                what_it_is(start)
                or "not a file of torch.save since torch 1.6; load it with torch and save it again"
            )
        return _tensors(path, Archive(source, 0, source.n_bytes))
    except UnknownFormError as error:
        return no_tensors(str(error))
    except ForbiddenNameError as error:
        return no_tensors(
            f"not only weights: it asks for {error}, which no dict of tensors needs. It was not "
            "opened further. Save the model's state_dict() alone"
        )
    except ValueError as error:
        return no_tensors(f"cut or damaged ({error}); download it again")


def _tensors(path: Location, archive: Archive) -> tuple[dict[str, TensorInfo], list[Problem]]:
    if not isinstance(archive.value, dict):
        kind = kind_of(archive.value)
        reason = f"expected a dict of tensors, found {kind}. Save the model's state_dict() alone"
        return {}, [Problem(f"{path}: {reason}", (path.name,))]
    keys, state = _model_in(archive.value)
    tensors: dict[str, TensorInfo] = {}
    problems: list[Problem] = []
    for name, made in state.items():
        # A trainer's counters and options are no weights, but whatever has a weight's name must be.
        if not isinstance(name, str):
            if is_tensor(made):
                reason = f"a tensor's name is not text but {type(name).__name__}"
                problems.append(Problem(f"{path}: {reason}", (path.name,)))
            continue
        if not is_tensor(made) and not _WEIGHT.search(name):
            continue
        try:
            stored = archive.tensor(made, views=True)
        except ValueError as error:
            problems.append(Problem(f"{path}: {name}: {error}", (name,)))
            continue
        start = (0,) * len(stored.shape)
        piece = Piece(path, stored.offset, start, stored.shape, stored.strides)
        tensors[name] = TensorInfo(name, stored.dtype, stored.shape, (piece,), keys=(*keys, name))
    if not tensors and not problems:
        found = first_few([f"{name!r} ({kind_of(made)})" for name, made in archive.value.items()])
        reason = f"no tensors in it, only {found or 'an empty dict'}"
        return {}, [Problem(f"{path}: {reason}", (path.name,))]
    others = [name for name in archive.value if name not in keys[:1]] if keys else []
    others += [name for name in state if name not in tensors and name not in explained(problems)]
    if others:
        where = f"read from its entry {'.'.join(keys)}; " if keys else ""
        message = f"{path}: {where}{len(others)} other entries are left out: "
        problems.append(warning(message + first_few(map(str, others))))
    return tensors, problems


# Parts of names that only weights of a Llama have, in any naming.
_WEIGHT = re.compile(
    r"(?:^|\.)(?:layers\.\d+\..+|tok_embeddings|embed_tokens|lm_head|output|norm)\.(?:weight|bias)$"
)
# What trainers call the weights, the preferred first: some keep an average of them as well.
_ENTRIES = ("model", "state_dict", "module", "model_state_dict", "model_state", "net", "weights")
_MOST_DEPTH = 4
_MOST_DICTS = 10_000


def _model_in(value: dict[Any, Any]) -> tuple[tuple[str, ...], dict[Any, Any]]:
    """Return the dict that holds the model, and the keys that lead to it.

    It is the one with the most weights; of several with as many, the first by `_ENTRIES`.
    """
    found: list[tuple[int, bool, int, tuple[str, ...], dict[Any, Any]]] = []
    level: list[tuple[tuple[str, ...], dict[Any, Any]]] = [((), value)]
    seen = {id(value)}
    for _ in range(_MOST_DEPTH):
        below = []
        for keys, state in level:
            names = [name for name, made in state.items() if is_tensor(made)]
            n_weights = sum(isinstance(name, str) and bool(_WEIGHT.search(name)) for name in names)
            rank = sum(_ENTRIES.index(key) if key in _ENTRIES else len(_ENTRIES) for key in keys)
            found.append((-n_weights, not names, rank, keys, state))
            for key, inner in state.items():
                if type(inner) is dict and isinstance(key, str) and id(inner) not in seen:
                    seen.add(id(inner))
                    below.append(((*keys, key), inner))
        level = below[: _MOST_DICTS - len(seen)] if len(seen) < _MOST_DICTS else []
    *_, keys, state = min(found, key=lambda one: one[:4])
    return keys, state
