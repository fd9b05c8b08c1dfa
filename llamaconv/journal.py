"""What an unfinished target holds already, so that the next run need not begin anew.

The journal of a file has a line for every tensor, or part of one, that is written, with the digest
of its bytes. A line is a promise that is checked: whoever takes bytes over reads them again. So
nothing depends on the order in which a disk wrote journal and file. Only where the disk refused a
file's bytes, its journal goes: they may be read back from memory all the same.

The journals lie in a folder beside the files, with the fingerprint of the conversion: another
conversion to the same target takes nothing over.
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
class Entry:
    """The first ``rows`` of the file's payload ``number`` are written; xxh3-128 of their bytes."""

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
    def begun(self) -> bool:
        return self._path.exists()

    def read(self) -> dict[int, Entry]:
        """The last entry of each payload. A line that a kill cut short is passed by."""
        entries = {}
        for line in self._path.read_bytes().splitlines() if self.begun else ():
            try:
                entry = Entry(**json.loads(line))
                if type(entry.number) is type(entry.rows) is int and entry.rows >= 0:
                    entries[entry.number] = entry
            except (ValueError, TypeError, RecursionError):
                continue
        return entries

    def add(self, entries: Iterable[Entry]) -> None:
        # The first line ends what a kill may have cut short.
        lines = "".join(f"\n{json.dumps(asdict(entry))}" for entry in entries)
        with self._lock:
            if not self._removed:
                with open(self._path, "ab", buffering=0) as file:
                    file.write(f"{lines}\n".encode())

    def remove(self) -> None:
        """Nothing is vouched for any more, nor will be: for another thread than the one that adds."""
        with self._lock:
            self._removed = True
            self._path.unlink(missing_ok=True)


def keep(folder: Path, fingerprint: str) -> None:
    """Makes ``folder`` ready: what the same conversion left is kept, all else removed."""
    journals = folder / FOLDER
    mine = _fingerprint(journals) == fingerprint and not journals.is_symlink()
    for entry in list(folder.iterdir()):
        if not mine or not (entry == journals or _is_vouched_for(entry)):
            remove(entry)
    journals.mkdir(exist_ok=True)
    for journal in list(journals.iterdir()):
        if journal.name != _FINGERPRINT and not (folder / journal.name[: -len(_SUFFIX)]).exists():
            remove(journal)
    (journals / _FINGERPRINT).write_text(fingerprint)


def _is_vouched_for(entry: Path) -> bool:
    status = entry.lstat()
    # A link, even a hard one, would be written through to a file elsewhere.
    own = stat.S_ISREG(status.st_mode) and status.st_nlink == 1
    return own and bool(Journal(entry.parent, entry.name).read())


def kept_bytes(folder: Path, fingerprint: str) -> int:
    """Bytes on the disk that the next run of the same conversion may take over."""
    journals = folder / FOLDER
    if _fingerprint(journals) != fingerprint:
        return 0
    files = (folder / path.name[: -len(_SUFFIX)] for path in journals.glob(f"*{_SUFFIX}"))
    return sum(file.stat().st_blocks * 512 for file in files if file.is_file())


def remove(path: Path) -> None:
    """A file, a link or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _fingerprint(journals: Path) -> str | None:
    try:
        # Bounded, and never through a link: the folder may be anybody's.
        descriptor = os.open(journals / _FINGERPRINT, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            return file.read(1024).decode("ascii", "replace")
    except OSError:
        return None
