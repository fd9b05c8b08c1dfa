"""Repositories of the Hugging Face Hub by name, ``hf://ORG/NAME[@REVISION]``, and what stands
for a path where only headers were read.

Knows names and the command that downloads; `formats.hub` is what asks the Hub.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from llamaconv import shell
from llamaconv.problems import RefusedError

PREFIX = "hf://"

SAFETENSORS = ("*.safetensors", "*.json", "tokenizer*", "*.jinja", "*.txt")
"""Patterns of what a conversion reads of a Hugging Face repository, and hands on."""

# Letters, digits, - _ . as the Hub allows them (huggingface_hub's validate_repo_id), and what git
# allows in a branch or tag.
_PART = r"(?!-|\.)(?!\S*(?:--|\.\.))[A-Za-z0-9_.-]{1,96}(?<![-.])"
_NAME = re.compile(rf"hf://({_PART}/{_PART})(?:@([^\s\x00-\x20\x7f~^:?*\[\\@]+))?")


@dataclass(frozen=True)
class HubName:
    """A repository ``ORG/NAME``; ``revision`` is a branch, tag or commit, None the default branch."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{PREFIX}{self.repo}" + (f"@{self.revision}" if self.revision else "")

    def download(self, patterns: Iterable[str] = SAFETENSORS) -> str:
        """The command that brings the files of ``patterns`` into a folder called ``NAME``."""
        words = ["hf", "download", self.repo]
        if self.revision:
            words += ["--revision", self.revision]
        for pattern in patterns:
            words += ["--include", pattern]
        return shell.join([*words, "--local-dir", self.repo.split("/")[1]])


def is_remote(path: object) -> bool:
    """Whether ``path`` is the name of a repository rather than a path."""
    return isinstance(path, str) and path.startswith(PREFIX)


def parse(text: str) -> HubName:
    """The repository that ``text`` names. Raises `RefusedError` where it names none."""
    if match := _NAME.fullmatch(text):
        return HubName(match[1], match[2])
    raise RefusedError(
        f"{text}: is no name of a repository; hf://ORG/NAME or hf://ORG/NAME@REVISION was expected, "
        "a whole model repository without a file or folder in it"
    )


def refuse_remote(*paths: str | Path | None) -> None:
    """Raises `RefusedError`, with the command that downloads, for the first repository."""
    for path in paths:
        if isinstance(path, str) and is_remote(path):
            name = parse(path)
            raise not_here(path, name.download())


def not_here(address: object, download: str) -> RefusedError:
    """What to say where weights would have to be read."""
    return RefusedError(
        f"{address}: only headers are read from the Hub, and this needs the weights. Download "
        f"them, then name the folder: {download}"
    )


@dataclass(frozen=True)
class Remote:
    """A repository at one commit, or a file in it: what stands where a local one has a path.

    ``download`` is the command that brings the repository here.
    """

    address: str
    name: str
    commit: str
    download: str

    def __str__(self) -> str:
        return self.address

    def __truediv__(self, name: str) -> Remote:
        return replace(self, address=f"{self.address}/{name}", name=name)

    def refusal(self) -> RefusedError:
        """What to say where its bytes would have to be read."""
        return not_here(self, self.download)
