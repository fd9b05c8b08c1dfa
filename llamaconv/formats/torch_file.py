"""One file of ``torch.save``, opened for its tensors' names, shapes and places only.

Nothing in it runs, and no tensor is made (see `torch_archive`).
"""

from __future__ import annotations

import os
from pathlib import Path

from llamaconv.files import open_file, what_it_is
from llamaconv.formats.plain_pickle import ForeignError, UnknownFormError
from llamaconv.formats.torch_archive import Archive
from llamaconv.pieces import Piece, TensorInfo
from llamaconv.problems import Problem


def read_header(path: Path) -> tuple[dict[str, TensorInfo], list[Problem]]:
    """Tensors of one ``.pth`` or ``.bin`` file, and every problem found."""

    def no_tensors(reason: str) -> tuple[dict[str, TensorInfo], list[Problem]]:
        return {}, [Problem(f"{path}: {reason}", (path.name,))]

    try:
        with open_file(path) as file:
            start = file.read(512)
            if not start.startswith(b"PK\x03\x04"):
                return no_tensors(
                    what_it_is(start)
                    or "not a file of torch.save since torch 1.6; load it with torch and save it again"
                )
            archive = Archive(file, 0, os.fstat(file.fileno()).st_size)
            return _tensors(path, archive)
    except OSError as error:
        return no_tensors(error.strerror or str(error))
    except UnknownFormError as error:
        return no_tensors(str(error))
    except ForeignError as error:
        return no_tensors(
            f"not only weights, and was not opened further: it asks for {error}, which no dict of "
            "tensors needs"
        )
    except ValueError as error:
        return no_tensors(f"cut or damaged ({error}); download it again")


def _tensors(path: Path, archive: Archive) -> tuple[dict[str, TensorInfo], list[Problem]]:
    if not isinstance(archive.value, dict):
        kind = type(archive.value).__name__
        return {}, [Problem(f"{path}: holds {kind}, a dict of tensors was expected", (path.name,))]
    tensors: dict[str, TensorInfo] = {}
    problems: list[Problem] = []
    for name, made in archive.value.items():
        if not isinstance(name, str):
            problems.append(
                Problem(
                    f"{path}: a tensor's name is a {type(name).__name__}, no text", (path.name,)
                )
            )
            continue
        try:
            stored = archive.tensor(made)
        except ValueError as error:
            problems.append(Problem(f"{path}: {name}: {error}", (name,)))
            continue
        piece = Piece(path, stored.offset, (0,) * len(stored.shape), stored.shape)
        tensors[name] = TensorInfo(name, stored.dtype, stored.shape, (piece,))
    return tensors, problems
