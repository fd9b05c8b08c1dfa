"""Compare the files of a folder with the digests that a repository of the Hub lists.

The Hub lists a sha256 for every large file and the id of a git blob for every small one. One
request gets all of them; no file is sent. Names come from the folder, never from the repository.

Limit: that the repository is whose it claims to be is not checked; nothing is signed.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from llamaconv.checkpoint.address import local, path_or_address
from llamaconv.checkpoint.digests import difference, hasher
from llamaconv.checkpoint.hub import Repository, connect
from llamaconv.checkpoint.hub_address import HubAddress
from llamaconv.report.errors import FailedError, Problem, RefusedError, first_few, warning
from llamaconv.report.progress import Progress, no_progress
from llamaconv.report.tables import size

_BLOCK_BYTES = 4 << 20
# Where huggingface_hub and git keep their own files.
_NOT_MODEL = (".cache/*", ".git/*", ".huggingface/*")
# Kinds of weights. A folder needs all files of the kinds that it has.
_WEIGHTS = (
    *("original/consolidated.*.pth", "consolidated.*.pth", "consolidated*.safetensors"),
    *("pytorch_model*.bin", "*.safetensors", "*.distcp"),
)
# What a model needs besides its weights.
_SMALL = ("*.json", "tokenizer*")


@dataclass(frozen=True)
class Against:
    """What a folder and a repository have in common.

    Attributes:
        repository: The repository at its commit.
        equal: Files whose bytes are those of the repository.
        different: Why each other file of both is not equal, by its name.
        missing: Files of the repository that the model needs and the folder lacks.
        extra: Files that the repository lacks.
        left: Files of the repository that the folder lacks and does not need.
        unknown: Files of both for which the repository lists no digest.
    """

    repository: str
    equal: tuple[str, ...]
    different: dict[str, str]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    left: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()

    def problems(self, folder: Path) -> list[Problem]:
        """Return an error for each difference that matters, and warnings for the others."""
        found = [
            Problem(
                f"{folder / name}: {why}. Download the file again, or name the revision that was "
                "downloaded: hf://ORG/NAME@REVISION",
                (name,),
            )
            for name, why in self.different.items()
        ]
        if self.missing:
            found.append(
                Problem(
                    f"{folder}: {len(self.missing)} files of {self.repository} are missing: "
                    f"{first_few(self.missing)}. Download them",
                    self.missing,
                )
            )
        weights = [name for name in self.extra if _kind(name)]
        if weights:
            found.append(
                Problem(
                    f"{folder}: {len(weights)} files of weights are not in {self.repository}: "
                    f"{first_few(weights)}. Move them out of the folder",
                    tuple(weights),
                )
            )
        if rest := [name for name in self.extra if name not in weights]:
            found.append(warning(f"{folder}: not in {self.repository}: {first_few(rest)}", rest))
        if self.unknown:
            words = f"{folder}: {self.repository} lists no digest of {first_few(self.unknown)}"
            found.append(warning(words, self.unknown))
        return found

    def to_json(self) -> dict[str, Any]:
        """Return the attributes by their names."""
        return {
            "repository": self.repository,
            "equal": [*self.equal],
            "different": self.different,
            "missing": [*self.missing],
            "extra": [*self.extra],
            "left": [*self.left],
            "unknown": [*self.unknown],
        }

    def __str__(self) -> str:
        text = f"{len(self.equal)} files have the digests of {self.repository}"
        return f"{text}; not downloaded: {first_few(self.left)}" if self.left else text


def compare_with_repository(
    folder: Path, address: str, progress: Progress = no_progress
) -> Against:
    """Read every file of ``folder`` that a repository has, and compare its digest.

    Args:
        folder: A local folder.
        address: ``hf://ORG/NAME[@REVISION]``.
        progress: Called with "read", the bytes read so far, and all bytes to read.

    Raises:
        RefusedError: ``folder`` is not a folder, ``address`` is not a repository, or the Hub does
            not list it.
        FailedError: A file cannot be read.
    """
    where = path_or_address(address)
    if not isinstance(where, HubAddress):
        raise RefusedError(
            f"{address}: not a repository; use hf://ORG/NAME or hf://ORG/NAME@REVISION"
        )
    if not local(folder).is_dir():
        raise RefusedError(f"{folder}: not a folder; --against compares all files of a folder")
    repository = connect(where)
    files = _files(folder)
    both = {name: file for name, file in files.items() if name in repository.files}
    different = {
        name: why for name, file in both.items() if (why := _other_size(repository, name, file))
    }
    unknown = [name for name in both if name not in repository.digests and name not in different]
    to_read = [name for name in both if name not in different and name not in unknown]
    total, done, equal = sum(repository.files[name] for name in to_read), 0, []
    for name in to_read:
        digest = hasher(repository.digests[name], repository.files[name])
        for block in _blocks(both[name]):
            digest.update(block)
            done += len(block)
            progress("read", done, total)
        if why := difference(repository.digests[name], digest.hexdigest(), repository.path):
            different[name] = why
        else:
            equal.append(name)
    lacking = [name for name in repository.files if name not in files]
    missing = [name for name in lacking if _is_needed(name, files)]
    return Against(
        repository=str(repository.path),
        equal=tuple(equal),
        different=different,
        missing=tuple(missing),
        extra=tuple(sorted(files.keys() - repository.files.keys())),
        left=tuple(name for name in lacking if name not in missing),
        unknown=tuple(unknown),
    )


def _files(folder: Path) -> dict[str, Path]:
    """Return the files of a folder, by their names as a repository writes them."""
    found = {
        file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()
    }
    return {
        name: file
        for name, file in sorted(found.items())
        if not any(fnmatchcase(name, pattern) for pattern in _NOT_MODEL)
    }


def _kind(name: str) -> str:
    """Return the pattern of weights that a name fits; empty for other files."""
    patterns = (pattern for pattern in _WEIGHTS if fnmatchcase(name, pattern))
    return next((pattern for pattern in patterns if pattern.count("/") == name.count("/")), "")


def _is_needed(name: str, files: dict[str, Path]) -> bool:
    """Return whether a folder of ``files`` needs this file, too."""
    if kind := _kind(name):
        kinds = {*map(_kind, files)} - {""}
        return not kinds or kind in kinds
    return "/" not in name and any(fnmatchcase(name, pattern) for pattern in _SMALL)


def _other_size(repository: Repository, name: str, file: Path) -> str:
    n_bytes, expected = file.stat().st_size, repository.files[name]
    if n_bytes == expected:
        return ""
    return (
        f"has {size(n_bytes)} ({n_bytes:,} bytes), and {repository.path} lists {expected:,} bytes"
    )


def _blocks(file: Path) -> Any:
    try:
        with file.open("rb") as content:
            while block := content.read(_BLOCK_BYTES):
                yield block
    except OSError as error:
        raise FailedError(f"{file}: cannot be read: {error.strerror or error}") from error
