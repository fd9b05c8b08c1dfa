"""Record what an unfinished target already contains, so that the next run can continue.

The journal of a file has one line per tensor, or part of a tensor, that is written, with the digest
of its bytes. A run that reuses bytes reads them again and compares, so nothing depends on the order
in which a disk wrote journal and file. Only if the disk refused the bytes of a file is its journal
deleted: the bytes might still be read back from memory.

The journals are in a folder next to the files, with the fingerprint of the conversion: another
conversion to the same target reuses nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import threading
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

FOLDER = ".llamaconv-journal"
_FINGERPRINT = "fingerprint"
_SUFFIX = ".jsonl"


@dataclass(frozen=True)
class JournalEntry:
    """A part of a file that is written.

    Attributes:
        number: Number of the payload in its file, from 0.
        rows: Number of rows written, from the first.
        digest: xxh3-128 of their bytes.
    """

    number: int
    rows: int
    digest: str


class Journal:
    """The journal of the file ``name`` of the unfinished target in ``folder``."""

    def __init__(self, folder: Path, name: str) -> None:
        self._path = folder / FOLDER / f"{name}{_SUFFIX}"
        self._lock = threading.Lock()
        self._removed = False

    @property
    def exists(self) -> bool:
        """Whether the file has a journal; files below 8 MiB have none."""
        return self._path.exists()

    def read(self) -> dict[int, JournalEntry]:
        """Return the last entry of each payload. A line that a kill cut short is ignored."""
        entries = {}
        for line in self._path.read_bytes().splitlines() if self.exists else ():
            try:
                entry = JournalEntry(**json.loads(line))
                if type(entry.number) is type(entry.rows) is int and entry.rows >= 0:
                    entries[entry.number] = entry
            except (ValueError, TypeError, RecursionError):
                continue
        return entries

    def add(self, entries: Iterable[JournalEntry]) -> None:
        """Append entries."""
        # The first line ends what a kill may have cut short.
        lines = "".join(f"\n{json.dumps(asdict(entry))}" for entry in entries)
        with self._lock:
            if not self._removed:
                with self._path.open("ab", buffering=0) as file:
                    file.write(f"{lines}\n".encode())

    def remove(self) -> None:
        """Delete the journal and ignore later calls of `add`. May be called from any thread."""
        with self._lock:
            self._removed = True
            self._path.unlink(missing_ok=True)


def keep(folder: Path, fingerprint: str) -> None:
    """Keep what the same conversion left in ``folder``, remove everything else."""
    journals = folder / FOLDER
    mine = _fingerprint(journals) == fingerprint and not journals.is_symlink()
    for entry in list(folder.iterdir()):
        if not mine or not (entry == journals or _is_recorded(entry)):
            remove(entry)
    journals.mkdir(exist_ok=True)
    for journal in list(journals.iterdir()):
        if journal.name != _FINGERPRINT and not (folder / journal.name[: -len(_SUFFIX)]).exists():
            remove(journal)
    (journals / _FINGERPRINT).write_text(fingerprint)


def _is_recorded(entry: Path) -> bool:
    status = entry.lstat()
    # Writing to a link, even a hard one, would change a file elsewhere.
    own = stat.S_ISREG(status.st_mode) and status.st_nlink == 1
    return own and bool(Journal(entry.parent, entry.name).read())


def kept_bytes(folder: Path, fingerprint: str) -> int:
    """Return the bytes on the disk that the next run of the same conversion may reuse."""
    journals = folder / FOLDER
    if _fingerprint(journals) != fingerprint:
        return 0
    files = (folder / path.name[: -len(_SUFFIX)] for path in journals.glob(f"*{_SUFFIX}"))
    return sum(file.stat().st_blocks * 512 for file in files if file.is_file())


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with everything in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _fingerprint(journals: Path) -> str | None:
    try:
        # Bounded, and never through a link: the folder may have been prepared by somebody else.
        descriptor = os.open(journals / _FINGERPRINT, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            return file.read(1024).decode("ascii", "replace")
    except OSError:
        return None
