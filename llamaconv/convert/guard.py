"""A small process that removes what a conversion has put into a store, if the conversion is killed.

It waits for its input to end. `Guard` starts it, and tells it at the end that all is well. It
imports the driver, and sends requests, only if nobody does.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict

from llamaconv.checkpoint.store_address import StoreAddress
from llamaconv.convert import partial

# What was on its way when the process was killed is there by then, or never.
_SETTLE_SECONDS = (0.0, 2.0, 5.0)
_DONE = "done"
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.stdin.readline()); "
    "from llamaconv.convert.guard import main; main()"
)


class Guard:
    """The guard of a conversion. Several ranks have one each."""

    def __init__(self, address: StoreAddress, marker: partial.Marker) -> None:
        """Start it; its own session keeps signals of the terminal away. Raises ``OSError``."""
        self._process = subprocess.Popen(
            # Without -P, it would import what lies in the current folder.
            [sys.executable, "-P", "-c", _START],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            text=True,
        )
        self._say(json.dumps(sys.path))
        # By a pipe, which nobody else can read: an address may contain a password.
        self._say(json.dumps({"url": address.url, "marker": asdict(marker)}))

    def dismiss(self) -> None:
        """Let it end: nothing is left to remove, or all of it is a checkpoint. May be repeated."""
        stdin = self._process.stdin
        assert stdin is not None
        if stdin.closed:
            return
        self._say(_DONE)
        with suppress(OSError):
            stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(10)

    def _say(self, line: str) -> None:
        with suppress(OSError):  # it has ended, and cannot guard any more
            assert self._process.stdin is not None
            print(line, file=self._process.stdin, flush=True)


def main() -> None:
    """Wait for the end of the input, then remove what is left."""
    job = json.loads(sys.stdin.readline())
    if sys.stdin.readline().strip() == _DONE:
        return
    from llamaconv.checkpoint.stores import filesystem

    fs, path = filesystem(StoreAddress(job["url"]))
    marker = partial.Marker(**job["marker"])
    for seconds in _SETTLE_SECONDS:
        time.sleep(seconds)
        is_last = seconds == _SETTLE_SECONDS[-1]
        with suppress(Exception):
            partial.remove(fs, path, marker, even_complete=False, is_last_pass=is_last)
