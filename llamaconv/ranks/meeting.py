"""A world of several ranks, which meet at the store that torchrun keeps for them.

torch.distributed brings them together (its env:// rendezvous gives the TCPStore) and small values
pass through that store, as JSON: whoever reaches the port can run no code by it. There is no
process group. A gloo collective waits where neither a signal nor another rank's failure can end
it, its timeout would limit how long a rank may write, and between hosts it has to guess a network
interface; a conversion has no tensors to exchange that would be worth that.

Each rank gives a sign of life twice a second. On one host the kernel tells at once that a process
has ended; of another host's ranks nothing is heard for some seconds first.

Limit: the store is the one thing that cannot be lost. Where its host goes, every rank ends.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any

from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from llamaconv.problems import FailedError, LlamaconvError
from llamaconv.ranks import OtherRankError, Progress, Ranks

_BEAT_SECONDS = 0.5
# Of a rank on another host: its process may wait for a slow disk, its thread that beats does not.
_SILENT_SECONDS = 15.0
# Until all are there, and until all have stopped.
_MEET_SECONDS = 300.0
_STOP_SECONDS = 20.0


@dataclass(frozen=True)
class _Failure:
    """Why the conversion ends: of which ``rank``, found ``by`` which, and with what status."""

    rank: int
    by: int
    status: int
    messages: list[str]


class Meeting(Ranks):
    """One of several ranks; see `Ranks` for what each method promises. To be used once.

    Entering raises `FailedError` where the others do not come.
    """

    def __init__(self, rank: int, size: int, local_size: int, place: str) -> None:
        self.rank, self.size, self.local_size = rank, size, local_size
        self.place = place
        self._store: Store
        self._failure: _Failure | None = None
        self._turn = self._beats = 0
        self._hosts: list[str] = []
        self._lives: dict[int, int] = {}  # pidfd to rank
        self._heard: dict[int, tuple[bytes, float]] = {}
        self._dead: set[int] = set()
        self._poll = select.poll()
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._ending = False
        self._progress: Progress | None = None
        self._count: tuple[str, int, int] = ("", 0, 0)
        self._drawn = ("", 0)
        self._thread = threading.Thread(target=self._watch, name="ranks", daemon=True)
        self._handler: Any = None

    def __enter__(self) -> Ranks:
        if threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGTERM, self._terminated)
        try:
            self._meet()
        except RuntimeError as error:
            raise FailedError(
                f"rank {self.rank} of {self.size} found no store at {self.place}: {_line(error)}"
            ) from error
        self._thread.start()
        return self

    def _meet(self) -> None:
        timeout = timedelta(seconds=_MEET_SECONDS)
        store, _, _ = next(rendezvous("env://", self.rank, self.size, timeout=timeout))
        # After a restart of torchrun's the same store may be there, with what was said before.
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store = PrefixStore(f"llamaconv/{restart}", store)
        self._beat()
        self._store.set(f"life/{self.rank}", json.dumps(_own_life()))
        everyone = range(self.size)
        if not self._wait(lambda: self._there("life", everyone), _MEET_SECONDS):
            late = [str(rank) for rank in everyone if not self._there("life", [rank])]
            raise FailedError(
                f"rank {self.rank} waited {_MEET_SECONDS:.0f} s for rank {', '.join(late)}; "
                f"WORLD_SIZE is {self.size}: unset it to convert with one process"
            )
        lives = [json.loads(self._store.get(f"life/{rank}")) for rank in everyone]
        self._hosts = [life["host"] for life in lives]
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

    @property
    def speaks(self) -> bool:
        if self.first or self._failure is None:
            return self.first
        return 0 in self._dead and self._failure.by == self.rank

    def together(self, value: Any) -> list[Any]:
        # Rank 0 alone reads from each; it hands on what all have said in one piece.
        self._turn += 1
        key = f"said/{self._turn}"
        with self._storing():
            self._beat()
            if self.rank:
                self._store.set(f"{key}/{self.rank}", json.dumps(value))
                return list(json.loads(self._read(f"{key}/0")))
            others = [self._read(f"{key}/{rank}") for rank in range(1, self.size)]
            values = [json.loads(json.dumps(value)), *map(json.loads, others)]
            self._store.set(f"{key}/0", json.dumps(values))
            self._listen()
            self._draw()
            return values

    def from_first(self, value: Any = None) -> Any:
        self._turn += 1
        key = f"first/{self._turn}"
        with self._storing():
            if self.first:
                self._store.set(key, json.dumps(value))
                return value
            return json.loads(self._read(key))

    def _read(self, key: str) -> bytes:
        """What another rank says under ``key``, once it does."""
        pause = 0.002
        while not self._store.check([key]):
            self.look()
            self._draw()
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
        return self._store.get(key)

    def look(self) -> None:
        if self._failure is not None:
            raise self._other(self._failure)

    def _other(self, failure: _Failure) -> OtherRankError:
        return OtherRankError(failure.messages, failure.status)

    def counted(self, progress: Progress | None) -> Progress:
        self._progress = progress if self.first else None

        def count(step: str, done: int, total: int) -> None:
            self.look()
            self._count = (step, done, total)
            self._draw()

        return count

    def _draw(self) -> None:
        step, done, total = self._count
        if self._progress is None or not step:
            return
        for text, _ in list(self._heard.values()):
            _, its_step, its_done = json.loads(text)
            done += its_done if its_step == step else 0
        if (step, done) != self._drawn:
            self._drawn = step, done
            self._progress(step, min(done, total), total)

    def end(self, error: BaseException) -> None:
        if self._ending:
            return
        self._ending = True
        with self._storing(quiet=True):
            if self._failure is None:
                # torchrun ends every rank when one has died: that death is the reason.
                self._find_dead(0)
            if self._failure is None:
                status, messages = _told(error)
                name = self._name(self.rank)
                self._report(self.rank, status, [f"{name}: {message}" for message in messages])
            if self.first:
                self._wait(lambda: self._ended(range(1, self.size)), _STOP_SECONDS)
            else:
                self._store.set(f"ended/{self.rank}", "")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._storing(quiet=True):
            if error is not None:
                self.end(error)
            self._store.set(f"ended/{self.rank}", "")
            if self.first:
                # This process may be the store's; let the others read what they were told.
                self._wait(lambda: self._ended(range(1, self.size)), _STOP_SECONDS)
            elif error is not None:
                # Were this one gone before, torchrun would end rank 0 while it clears up.
                self._wait(lambda: self._ended([0]), 3 * _STOP_SECONDS)
        self._over.set()
        self._thread.join(2 * _BEAT_SECONDS)
        for descriptor in self._lives:
            os.close(descriptor)
        if self._handler is not None:
            signal.signal(signal.SIGTERM, self._handler)
        failure = self._failure
        if isinstance(error, KeyboardInterrupt) and failure and failure.status != 130:
            raise self._other(failure) from None

    def _terminated(self, number: int, frame: FrameType | None) -> None:
        # Where a rank has failed, this one ends by itself, and clears up undisturbed.
        if self._failure is None and not self._ending:
            raise KeyboardInterrupt

    # What the thread does: it gives signs of life, and looks for those of the others.

    def _watch(self) -> None:
        with self._storing(quiet=True):
            while not self._over.is_set():
                self._find_dead(_BEAT_SECONDS)
                self._beat()
                self._listen()

    def _beat(self) -> None:
        self._beats += 1
        step, done, _ = self._count
        self._store.set(f"beat/{self.rank}", json.dumps([self._beats, step, done]))

    def _find_dead(self, seconds: float) -> None:
        """Waits so long for one of this host's ranks to end."""
        with self._lock:
            for descriptor, _ in self._poll.poll(seconds * 1000):
                self._poll.unregister(descriptor)
                self._died(self._lives[descriptor], "has died")

    def _listen(self) -> None:
        if self._failure is None and self._store.check(["failed"]):
            self._failure = _Failure(**json.loads(self._store.get("failed")))
        others = range(1, self.size) if self.first else range(1)
        texts = self._store.multi_get([f"beat/{rank}" for rank in others])
        now = time.monotonic()
        for rank, text in zip(others, texts, strict=True):
            if rank not in self._heard or self._heard[rank][0] != text:
                self._heard[rank] = text, now
            elif now - self._heard[rank][1] > _SILENT_SECONDS and rank not in self._dead:
                self._died(rank, f"has given no sign of life for {_SILENT_SECONDS:.0f} s")

    def _died(self, rank: int, how: str) -> None:
        if self._there("ended", [rank]):
            return
        self._dead.add(rank)
        cause = "killed, perhaps for want of memory, or its host is gone"
        self._report(
            rank, 1, [f"{self._name(rank)} {how} ({cause}); the target is as it was before"]
        )

    def _report(self, rank: int, status: int, messages: list[str]) -> None:
        """Says why the conversion ends, unless that has been said; the first reason counts."""
        mine = json.dumps(asdict(_Failure(rank, self.rank, status, messages)))
        said = self._store.compare_set("failed", "", mine)
        self._failure = _Failure(**json.loads(said))

    # Small words.

    def _there(self, key: str, ranks: Iterable[int]) -> bool:
        names = [f"{key}/{rank}" for rank in ranks]
        return not names or self._store.check(names)

    def _ended(self, ranks: Iterable[int]) -> bool:
        return self._there("ended", [rank for rank in ranks if rank not in self._dead])

    def _wait(self, done: Callable[[], bool], seconds: float) -> bool:
        limit = time.monotonic() + seconds
        while not done():
            if time.monotonic() > limit:
                return False
            time.sleep(0.02)
        return True

    def _name(self, rank: int) -> str:
        return (
            f"rank {rank} on {self._hosts[rank]}" if len(set(self._hosts)) > 1 else f"rank {rank}"
        )

    @contextmanager
    def _storing(self, quiet: bool = False) -> Iterator[None]:
        """Turns an error of the store into the end of the conversion."""
        try:
            yield
        except RuntimeError as error:
            self._lose(error)
            if not quiet:
                self.look()

    def _lose(self, error: RuntimeError) -> None:
        """The store has gone: the first of this host's ranks says so, for rank 0 may be gone."""
        self._dead.add(0)
        if self._failure is None:
            here = {self.rank, *self._lives.values()} - {0}
            reason = f"rank 0 or its torchrun, which keeps the store at {self.place}, has gone"
            message = f"{reason} ({_line(error)}); the target is as it was before"
            self._failure = _Failure(0, min(here, default=0), 1, [message])


def _own_life() -> dict[str, Any]:
    """Host, process, and which kernel and process names these are of."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            kernel = f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        kernel = ""
    return {"host": socket.gethostname(), "pid": os.getpid(), "kernel": kernel}


def _told(error: BaseException) -> tuple[int, list[str]]:
    """Exit status and messages for the other ranks."""
    if isinstance(error, LlamaconvError):
        return error.status, [problem.message for problem in error.problems]
    if isinstance(error, KeyboardInterrupt):
        return 130, ["interrupted; nothing stands under the target's name"]
    return 1, [f"{type(error).__name__}: {_line(error)}"]


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
