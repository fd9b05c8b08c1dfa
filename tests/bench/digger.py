"""Keeps files that grow off the disk, without changing a byte that anyone reads.

While a command writes zeros, a thread frees the blocks of every page that is all zeros, behind the
writer: the pages read as zeros still. The command is paused while the disk holds too much of them.

The limit: the writer only appends, so that a page behind the end of a file stays as it is; a file
system with holes; Linux.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from pathlib import Path

_WINDOW, _PAGE = 1 << 20, 4096
_ZEROS = bytes(_WINDOW)
_MOST_ON_DISK = 4 << 30
_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # fallocate's modes, linux/falloc.h


class Digger:
    """Digs in the files below the folders that ``pattern`` matches in ``folder``, while entered."""

    def __init__(self, folder: Path, pattern: str) -> None:
        self.folder = folder
        self.pattern = pattern
        self.most_on_disk = 0
        self._dug: dict[str, int] = {}
        self._paused = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop)
        self._libc = ctypes.CDLL(None, use_errno=True)

    def __enter__(self) -> Digger:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self._dig_all()

    def look(self, pid: int) -> None:
        """Pauses the command, or lets it go on; called from where it is watched."""
        on_disk = sum(_on_disk(file) for file in self._files())
        self.most_on_disk = max(self.most_on_disk, on_disk)
        if (on_disk > _MOST_ON_DISK) != self._paused:
            self._paused = not self._paused
            os.killpg(pid, signal.SIGSTOP if self._paused else signal.SIGCONT)

    def _loop(self) -> None:
        while not self._stop.wait(0.02):
            self._dig_all()

    def _files(self) -> list[Path]:
        targets = self.folder.glob(self.pattern)
        return [file for target in targets for file in target.iterdir() if file.is_file()]

    def _dig_all(self) -> None:
        for file in self._files():
            try:
                self._dig(file)
            except FileNotFoundError:
                continue  # renamed into place meanwhile

    def _dig(self, path: Path) -> None:
        start = self._dug.get(path.name, 0)  # its folder is renamed, so the name alone
        with open(path, "r+b", buffering=0) as file:
            end = os.fstat(file.fileno()).st_size
            for at in range(start, end - _WINDOW + 1, _WINDOW):
                self._dig_window(file.fileno(), at)
                self._dug[path.name] = at + _WINDOW

    def _dig_window(self, descriptor: int, at: int) -> None:
        window = os.pread(descriptor, _WINDOW, at)
        if window == _ZEROS:
            self._punch(descriptor, at, _WINDOW)
            return
        for page in range(0, _WINDOW, _PAGE):
            if window[page : page + _PAGE] == _ZEROS[:_PAGE]:
                self._punch(descriptor, at + page, _PAGE)

    def _punch(self, descriptor: int, at: int, length: int) -> None:
        modes = _KEEP_SIZE | _PUNCH_HOLE
        if self._libc.fallocate(descriptor, modes, ctypes.c_int64(at), ctypes.c_int64(length)):
            raise OSError(ctypes.get_errno(), "this file system cannot free a part of a file")


def _on_disk(file: Path) -> int:
    try:
        return file.stat().st_blocks * 512
    except FileNotFoundError:
        return 0
