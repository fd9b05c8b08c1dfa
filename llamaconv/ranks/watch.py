"""Signs of life: how a rank learns that another one has failed, died or fallen silent.

Each rank gives a sign twice a second. On one host the kernel tells at once that a process has
ended; of another host's ranks nothing is heard for some seconds first. The first reason that any
rank reports is the one that all end with.

Limit: a rank that hangs but whose thread still gives signs counts as alive; the others wait.
"""

from __future__ import annotations

import json
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from torch.distributed.distributed_c10d import Store

from llamaconv.problems import FailedError

BEAT_SECONDS = 0.5
# Of a rank on another host: its process may wait for a slow disk, its thread that beats does not.
_SILENT_SECONDS = 15.0
# What was sent but not taken, and a connection without an answer, ends after 15 s as well.
_KEEP_ALIVE = {
    socket.TCP_USER_TIMEOUT: 15_000,  # milliseconds
    socket.TCP_KEEPIDLE: 5,
    socket.TCP_KEEPINTVL: 5,
    socket.TCP_KEEPCNT: 2,
}


@dataclass(frozen=True)
class Failure:
    """Why the conversion ends: of which ``rank``, found ``by`` which, and with what status."""

    rank: int
    by: int
    status: int
    messages: list[str]


class Watch:
    """What one rank knows of the others; made once all are there to be met.

    ``failure`` is None until one is known, ``dead`` the ranks that ended without a word,
    ``counts`` what each of the others has done as far as it is known (step, bytes).
    ``own_count`` is what this rank tells the others. Methods raise ``RuntimeError`` where the
    store has gone.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self.store = store
        self.rank, self.size = rank, size
        self.failure: Failure | None = None
        self.dead: set[int] = set()
        self.counts: dict[int, tuple[str, int]] = {}
        self.own_count = ("", 0)
        self.hosts: list[str] = []
        self._beats = 0
        self._heard: dict[int, tuple[bytes, float]] = {}
        self._lives: dict[int, int] = {}  # descriptor of a process of this host, to its rank
        self._gone: set[int] = set()  # those whose process has ended, in whatever way
        self._poll = select.poll()
        self._lock = threading.Lock()

    def meet(self, seconds: float) -> None:
        """Waits for all; raises `FailedError` where one does not come."""
        self.beat()
        self.store.set(f"life/{self.rank}", json.dumps(_own_life()))
        everyone = range(self.size)
        if not self.wait(lambda: self.there("life", everyone), seconds):
            late = [str(rank) for rank in everyone if not self.there("life", [rank])]
            raise FailedError(
                f"rank {self.rank} waited {seconds:.0f} s for rank {', '.join(late)}; "
                f"WORLD_SIZE is {self.size}: unset it to convert with one process"
            )
        lives = [json.loads(self.store.get(f"life/{rank}")) for rank in everyone]
        self.hosts = [life["host"] for life in lives]
        for rank, life in enumerate(lives):
            if rank != self.rank and life["kernel"] == lives[self.rank]["kernel"]:
                self._follow(rank, life["pid"])

    def _follow(self, rank: int, pid: int) -> None:
        """Has the kernel tell when the process of ``rank``, on this host, ends."""
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            self._died(rank, "has died")
        except OSError:
            pass  # an older kernel: its signs of life have to do
        else:
            self._lives[descriptor] = rank
            self._poll.register(descriptor, select.POLLIN)

    def here(self) -> set[int]:
        """This rank, and those of this host that are alive."""
        ended = {self._lives[descriptor] for descriptor, _ in self._poll.poll(0)}
        return {self.rank, *self._lives.values()} - ended - self._gone

    def beat(self) -> None:
        """Gives a sign of life, with what this rank has done."""
        self._beats += 1
        self.store.set(f"beat/{self.rank}", json.dumps([self._beats, *self.own_count]))

    def find_dead(self, seconds: float) -> None:
        """Waits so long for one of this host's ranks to end."""
        with self._lock:
            for descriptor, _ in self._poll.poll(seconds * 1000):
                self._poll.unregister(descriptor)
                self._gone.add(self._lives[descriptor])
                self._died(self._lives[descriptor], "has died")

    def listen(self) -> None:
        """Rank 0 listens to all, the others to rank 0: that is enough, and little for a store."""
        if self.failure is None and self.store.check(["failed"]):
            self.failure = Failure(**json.loads(self.store.get("failed")))
        others = range(1, self.size) if self.rank == 0 else range(1)
        texts = self.store.multi_get([f"beat/{rank}" for rank in others])
        now = time.monotonic()
        for rank, text in zip(others, texts, strict=True):
            if rank not in self._heard or self._heard[rank][0] != text:
                self._heard[rank] = text, now
                _, step, done = json.loads(text)
                self.counts[rank] = step, done
            elif now - self._heard[rank][1] > _SILENT_SECONDS and rank not in self.dead:
                self._died(rank, f"has given no sign of life for {_SILENT_SECONDS:.0f} s")

    def _died(self, rank: int, how: str) -> None:
        if self.there("ended", [rank]):
            return
        self.dead.add(rank)
        cause = "killed, perhaps for want of memory, or its host is gone"
        message = f"{self.name(rank)} {how} ({cause}); the target is as it was before"
        self.report(rank, 1, [message])

    def report(self, rank: int, status: int, messages: list[str]) -> None:
        """Says why the conversion ends, unless that has been said; the first reason counts."""
        mine = json.dumps(asdict(Failure(rank, self.rank, status, messages)))
        said = self.store.compare_set("failed", "", mine)
        self.failure = Failure(**json.loads(said))

    def end(self) -> None:
        """Says that this rank writes no more, and that its process may end."""
        self.store.set(f"ended/{self.rank}", "")

    def ended(self, ranks: Iterable[int]) -> bool:
        return self.there("ended", [rank for rank in ranks if rank not in self.dead])

    def there(self, key: str, ranks: Iterable[int]) -> bool:
        names = [f"{key}/{rank}" for rank in ranks]
        return not names or self.store.check(names)

    def wait(self, done: Callable[[], bool], seconds: float) -> bool:
        """Whether ``done`` within ``seconds``."""
        limit = time.monotonic() + seconds
        while not done():
            if time.monotonic() > limit:
                return False
            time.sleep(0.02)
        return True

    def name(self, rank: int) -> str:
        several = len(set(self.hosts)) > 1
        return f"rank {rank} on {self.hosts[rank]}" if several else f"rank {rank}"

    def close(self) -> None:
        for descriptor in self._lives:
            os.close(descriptor)


def notice_lost_host(port: int) -> None:
    """Has the kernel end this process's connections to ``port`` where their host is lost.

    Torch waits for an answer of its store without a limit, and gives no way to its socket.
    """
    for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        try:
            connection = socket.socket(fileno=os.dup(int(name)))
        except OSError:
            continue  # no socket
        with connection:
            try:
                if connection.getpeername()[1] != port:
                    continue
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                for option, value in _KEEP_ALIVE.items():
                    connection.setsockopt(socket.IPPROTO_TCP, option, value)
            except (OSError, IndexError):
                continue  # a socket of another kind


def _own_life() -> dict[str, Any]:
    """Host, process, and which kernel and process names these are of."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            kernel = f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        kernel = f"unknown, of {os.getpid()}"
    return {"host": socket.gethostname(), "pid": os.getpid(), "kernel": kernel}
