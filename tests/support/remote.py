"""A local folder as if it were a repository: no server, ranges read from its files."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from typing import Any

from llamaconv.checkpoint.checkpoint import Checkpoint
from llamaconv.checkpoint.digests import Digest
from llamaconv.checkpoint.folder import Header
from llamaconv.checkpoint.huggingface import open_repository
from llamaconv.checkpoint.remote_file import RemoteFile
from llamaconv.checkpoint.untrusted.files import read_json
from llamaconv.checkpoint.untrusted.safetensors_header import header_end, parse_header
from llamaconv.report.errors import Problem


class FolderElsewhere:
    """The files at the top of ``folder``, with their digests as they are now."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = RemoteFile("hf://org/model@1", "org/model@1", "1", "hf download", self)
        files = [file for file in sorted(folder.iterdir()) if file.is_file()]
        self.files = {file.name: file.stat().st_size for file in files}
        self.digests: dict[str, Digest] = {
            file.name: ("sha256", hashlib.sha256(file.read_bytes()).hexdigest()) for file in files
        }
        self.has_ranges = True

    def names(self) -> list[str]:
        return [*self.files]

    def is_file(self, name: str) -> bool:
        return name in self.files

    def why_no_file(self, name: str) -> str:
        return "not found"

    def read_json(self, name: str) -> dict[str, Any]:
        return read_json(self.folder / name)

    def read_header(self, name: str) -> Header:
        return parse_header(self.path / name, self.start_of(name), self.files[name])

    def start_of(self, name: str) -> bytes:
        content = (self.folder / name).read_bytes()
        return content[: header_end(content, len(content))]

    def size(self, name: str) -> int:
        return self.files[name]

    def version_of(self, name: str) -> Any:
        return self.digests.get(name)

    def changed(self) -> list[Problem]:
        return []

    def read_into(self, name: str, first: int, out: memoryview, stop: threading.Event) -> None:
        out[:] = (self.folder / name).read_bytes()[first : first + len(out)]


def open_elsewhere(folder: Path) -> Checkpoint:
    """``folder``, opened as a repository."""
    return open_repository(FolderElsewhere(folder))
