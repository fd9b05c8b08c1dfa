"""How a gloo rank of a test ends: together with the others, and without torch's own way out.

A rank of gloo's that is still sending when another has left aborts, and so may one whose threads
are taken down at exit ("terminate called without an active exception"), now and then, on a busy
machine. What these ranks have to say is in files by then.
"""

import os
import sys
import time

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store


def leave() -> None:
    """Ends this process with status 0 once every rank is here."""
    dist.barrier()
    # torchrun keeps the store, so it outlives the ranks; no rank has a message under way after this.
    store = _get_default_store()
    store.add("left", 1)
    while store.add("left", 0) < dist.get_world_size():
        time.sleep(0.01)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
