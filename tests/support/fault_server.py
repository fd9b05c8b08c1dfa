"""A process that has torch imported, and forks one that runs the command line for each request.

A run of the command line of its own takes seconds of imports; forked ones start at once, and are
true processes that can be killed. Requests and answers are lines of JSON, see tests/support/faults.py.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import resource
import signal
import sys
import threading
import traceback
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from llamaconv.cli import main
from llamaconv.convert import direct, disk

# What a conversion imports late.
for name in (
    "llamaconv.convert.convert",
    "llamaconv.checkpoint.dcp",
    "llamaconv.checkpoint.meta",
    "llamaconv.report.progress",
    "llamaconv.verify.receipt_check",
    "safetensors.torch",
    "torch._dynamo",
    "torch.distributed.checkpoint._fsspec_filesystem",
    "torch.utils.serialization",
):
    importlib.import_module(name)

STDOUT, STDERR, LOG = 1, 2, 3


def run(request: dict[str, Any]) -> None:
    """Becomes the run that is asked for.

    Leaves with its status once its threads have ended, as the interpreter does, which would then
    take everything that is imported apart (half a second).
    """
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for name, number in (("out", STDOUT), ("err", STDERR), ("log", LOG)):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    if "file_limit" in request:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_limit"], resource.RLIM_INFINITY))
    if request.get("direct"):
        # As a target of many GB is written.
        disk._MOST_CACHED_BYTES = disk._LONG_FILE_BYTES = 0
        direct._BUFFER_BYTES = 2 * direct._ALIGNED
    for name, value in request["constants"].items():
        module, _, constant = name.rpartition(".")
        assert hasattr(importlib.import_module(module), constant), name
        setattr(importlib.import_module(module), constant, value)
    if "fault" in request:
        prefix, only, *numbers = request["fault"]
        arm = ctypes.CDLL(None).faults_arm
        arm(os.fsencode(prefix), os.fsencode(only), *numbers, LOG)
    try:
        status = main(request["arguments"])
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else 2
    except BaseException:
        traceback.print_exc()
        status = 1
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


def serve() -> None:
    with FakeTensorMode():
        torch.empty(1)
    gc.freeze()
    while line := sys.stdin.buffer.raw.readline():
        request = json.loads(line)
        answer: dict[str, Any]
        if "arguments" in request:
            process = os.fork()
            if process == 0:
                run(request)
            answer = {"process": process}
        else:
            _, status, used = os.wait4(request["wait"], os.WUNTRACED)
            stopped = os.WIFSTOPPED(status)
            status = None if stopped else os.waitstatus_to_exitcode(status)
            answer = {"status": status, "seconds": used.ru_utime + used.ru_stime}
        os.write(STDOUT, json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    serve()
