"""Repositories of the Hugging Face Hub by name, ``hf://ORG/NAME[@REVISION]``.

This module knows names and the command that downloads; `hub` sends the requests.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

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


def hub_address(text: str) -> HubAddress:
    """Return the repository that ``text`` names. Raises `RefusedError` if it names none."""
    if match := _NAME.fullmatch(text):
        return HubAddress(match[1], match[2])
    raise RefusedError(
        f"{text}: invalid repository name; use hf://ORG/NAME or hf://ORG/NAME@REVISION (a whole "
        "model repository, not a file in it)"
    )
