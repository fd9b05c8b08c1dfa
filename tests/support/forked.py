"""Runs a function in a fork of this process, so that a crash or a hang is a failure like others.

What runs there may damage memory (torch's reader of archives is C++), wait forever, or ask for
too much: the parent goes on, and can say which input it was.
"""

from __future__ import annotations

import os
import pickle
import resource
import select
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

SECONDS = 60
MEGABYTES = 400
"""What one run may hold more than this process does already; far above any block or window."""


def run(function: Callable[[], Any]) -> Any:
    """What ``function`` returns (pickled). Raises ``AssertionError`` where it does not."""
    ours, theirs = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.close(ours)
        _in_the_child(function, theirs)
    os.close(theirs)
    try:
        content = _all(ours)
        if content is None:
            os.kill(child, signal.SIGKILL)
    finally:
        os.close(ours)
        _, status = os.waitpid(child, 0)
    assert content is not None, f"no answer after {SECONDS} s"
    code = os.waitstatus_to_exitcode(status)
    assert code == 0, f"died of {signal.Signals(-code).name if code < 0 else code}"
    kind, value, grown = pickle.loads(content)
    assert kind == "returned", value
    assert grown < MEGABYTES, f"held {grown:.0f} MB more"
    return value


def _in_the_child(function: Callable[[], Any], out: int) -> None:
    before = _peak()
    try:
        answer: tuple[str, Any] = "returned", function()
    except BaseException:
        answer = "raised", traceback.format_exc()
    try:
        with os.fdopen(out, "wb") as file:
            file.write(pickle.dumps((*answer, _peak() - before)))
    finally:
        os._exit(0)


def _peak() -> float:
    """MB resident at the peak; a fork begins with what its parent has."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def _all(descriptor: int) -> bytes | None:
    """Everything until the other end is closed, None where it takes too long."""
    content = b""
    while select.select([descriptor], [], [], SECONDS)[0]:
        part = os.read(descriptor, 1 << 16)
        if not part:
            return content
        content += part
    return None
