"""The memory of a process that has only imported torch, which depends on the build of torch."""

import subprocess
import sys
from functools import cache

_CODE = """
import re, torch
print(*re.findall(r"Vm(?:Peak|HWM):\\s*(\\d+) kB", open("/proc/self/status").read()))
"""


@cache
def _measured() -> tuple[int, int]:
    done = subprocess.run(
        [sys.executable, "-c", _CODE], stdout=subprocess.PIPE, text=True, check=True
    )
    reserved, resident = (int(number) * 1024 for number in done.stdout.split())
    return reserved, resident


def reserved() -> int:
    """Bytes of address space; a limit on those (``RLIMIT_AS``) is set on top of them."""
    return _measured()[0]


def resident() -> int:
    """Bytes in memory."""
    return _measured()[1]
