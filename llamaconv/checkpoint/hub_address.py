"""Repositories of the Hugging Face Hub by name, ``hf://ORG/NAME[@REVISION]``, and their files.

This module knows names and the command that downloads; `hub` sends the requests.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from llamaconv.report import shell
from llamaconv.report.errors import RefusedError

PREFIX = "hf://"

SAFETENSORS = (
    *("*.safetensors", "*.json", "tokenizer*", "*.jinja", "*.txt"),
    *("LICENSE*", "USE_POLICY*", "README*"),
)
"""Patterns of the files of a Hugging Face repository that a conversion reads or copies."""

# Letters, digits, - _ . as the Hub allows them (huggingface_hub's validate_repo_id), and what git
# allows in a branch or tag.
_PART = r"(?!-|\.)(?!\S*(?:--|\.\.))[A-Za-z0-9_.-]{1,96}(?<![-.])"
_NAME = re.compile(rf"hf://({_PART}/{_PART})(?:@([^\s\x00-\x20\x7f~^:?*\[\\@]+))?")


@dataclass(frozen=True)
class HubAddress:
    """A repository ``ORG/NAME`` at a branch, tag or commit; None is the default branch."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{PREFIX}{self.repo}" + (f"@{self.revision}" if self.revision else "")

    def download(self, patterns: Iterable[str] = SAFETENSORS) -> str:
        """Return the command that downloads the files of ``patterns`` to a folder ``NAME``."""
        words = ["hf", "download", self.repo]
        if self.revision:
            words += ["--revision", self.revision]
        for pattern in patterns:
            words += ["--include", pattern]
        return shell.join([*words, "--local-dir", self.repo.split("/")[1]])


class ByteRanges(Protocol):
    """What has the bytes of files that are elsewhere, each by its name."""

    def read_into(self, name: str, first: int, out: memoryview, stop: threading.Event) -> None:
        """Fill ``out`` with the bytes of the file ``name`` from byte ``first`` on.

        Raises:
            FailedError: They could not be fetched, or ``stop`` was set.
        """


@dataclass(frozen=True)
class HubFile:
    """A repository at one commit, or a file in it. It stands in for a local path.

    Attributes:
        address: ``hf://ORG/NAME@COMMIT``, with the file's name behind it.
        name: The file's name in the repository; of a repository, its name, short enough for tables.
        commit: The commit, in full.
        download: The command that downloads the repository.
        ranges: Where its bytes come from.
    """

    address: str
    name: str
    commit: str
    download: str
    ranges: ByteRanges | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        return self.address

    def __truediv__(self, name: str) -> HubFile:
        return replace(self, address=f"{self.address}/{name}", name=name)


_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


# A page of the Hub as browsers show it; a revision follows /tree/, /blob/ or /resolve/.
_PAGE = re.compile(
    rf"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/({_PART}/{_PART})"
    r"(?:/(?:tree|blob|resolve)/([^/?#\s]+))?(?:[/?#].*)?"
)
# The Hub's own pages, which are not those of an organisation.
_NOT_MODELS = ("datasets/", "spaces/", "docs/", "blog/", "models/", "collections/", "papers/")


def repository_meant(text: str) -> str:
    """Return ``hf://ORG/NAME`` if ``text`` is ORG/NAME, as for transformers, or a page; else ""."""
    if page := _PAGE.fullmatch(text):
        if page[1].startswith(_NOT_MODELS):
            return ""
        return str(HubAddress(page[1], None if page[2] in (None, "main") else page[2]))
    name = f"{PREFIX}{text}"
    return name if _NAME.fullmatch(name) and "@" not in text else ""


def path_or_address(
    text: str | Path, remedy: str = "Copy the files to a local folder"
) -> Path | HubAddress:
    """Return what the user's ``text`` names: a repository if it begins with ``hf://``, else a path.

    Args:
        text: What the user gave.
        remedy: What to do instead of giving an address of another kind.

    Raises:
        RefusedError: It begins with ``hf://``, but is not the name of a repository; or it is an
            address of another kind, such as ``s3://``.
    """
    if isinstance(text, Path):
        return text
    if not text.startswith(PREFIX):
        if scheme := _SCHEME.match(text):
            if meant := repository_meant(text):
                raise RefusedError(f"{text}: for the repository on the Hub, use {meant}")
            raise RefusedError(
                f"{text}: addresses that begin with {scheme[0]} are neither read nor written. {remedy}"
            )
        return Path(text)
    if match := _NAME.fullmatch(text):
        return HubAddress(match[1], match[2])
    raise RefusedError(
        f"{text}: invalid repository name; use hf://ORG/NAME or hf://ORG/NAME@REVISION (a whole "
        "model repository, not a file in it)"
    )


def local(file: Path | HubFile | HubAddress) -> Path:
    """Return ``file`` if it is a local path.

    Raises:
        RefusedError: It is on the Hub; with the command that downloads it.
    """
    if isinstance(file, Path):
        return file
    download = file.download() if isinstance(file, HubAddress) else file.download
    raise RefusedError(
        f"{file}: this reads all weights, and from the Hub only a conversion does. Download them, "
        f"then name the folder: {download}"
    )
