"""Run by torchrun: the command line, with something done to a rank, and its end written down.

    torchrun --standalone --nproc-per-node 2 ranks_side.py NOTES FAULT convert SRC DST …

NOTES is a folder; each rank leaves its process id there and its exit status. FAULT is "none", or
"slow": every block takes a while; "kept": so, and journals begin after some kB; "full": so, and rank 1's files cannot grow (as on a full disk,
and for real); "interrupted": so, and rank 1 is terminated while it writes; "changed": rank 1
sees its source change; "apart": rank 1 runs in another folder; or a path: rank 1's SRC.
"""

import os
import resource
import signal
import sys
import time
from pathlib import Path

from llamaconv.cli import main
from llamaconv.convert import disk_file
from llamaconv.convert.engine import Engine

notes, fault, *arguments = sys.argv[1:]
rank = int(os.environ["RANK"])
(Path(notes) / f"pid-{rank}").write_text(str(os.getpid()))
count = Engine.count


def slow(engine: Engine, *counts: int) -> None:
    if fault != "changed":
        time.sleep(0.1)
    if rank == 1 and fault == "interrupted":
        os.kill(os.getpid(), signal.SIGTERM)
    if rank == 1 and fault == "changed":
        os.utime(next(Path(arguments[1]).glob("*.safetensors")), (1, 1))
    count(engine, *counts)


if fault in ("slow", "kept", "full", "interrupted", "changed"):
    Engine.count = slow
if fault == "kept":
    disk_file._JOURNAL_BYTES = 10_000
if rank == 1 and fault == "full":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
if rank == 1 and fault == "apart":
    os.chdir(notes)
if rank == 1 and fault.startswith("/"):
    arguments[1] = fault
status = main(arguments)
(Path(notes) / f"status-{rank}").write_text(str(status))
sys.exit(status)
