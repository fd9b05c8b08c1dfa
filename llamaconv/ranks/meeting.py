"""Several ranks, which exchange small values through the store that torchrun keeps.

Values are JSON in torch's TCPStore, so that nobody who reaches its port can run code. There is no
process group: a gloo collective cannot be interrupted, must guess a network interface, and has a
timeout that would limit how long a rank may write.

Each rank gives a sign of life twice per second. If a rank dies, torchrun sends SIGTERM to the
others on its host, and they look for the rank that is silent; if none is, SIGTERM interrupts the
conversion. Rank 0 also notices if a rank of another host is silent for 15 seconds.

Limit: a rank that hangs while its thread gives signs of life counts as alive; the others wait.

Limit: no rank can go on without the store, which torchrun keeps on the first host. If that torchrun
ends, all ranks end at once. If its host loses power or network, each other host waits until its
kernel gives up the connection, by default about 15 minutes (net.ipv4.tcp_retries2 of Linux).
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing.pool import ThreadPool
from typing import Any

from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from llamaconv.ranks import OtherRankError, Ranks
from llamaconv.report.errors import INTERRUPTED, FailedError, LlamaconvError
from llamaconv.report.progress import Progress

_BEAT_SECONDS = 0.5
_MEET_SECONDS = 300.0
# Until a rank counts as dead: after its last sign of life, and after SIGTERM.
_SILENT_SECONDS = 15.0
_DEAD_SECONDS = 3.0
# Until the others stop writing, and until rank 0 cleaned up. torchrun kills 30 s after SIGTERM.
_END_SECONDS = 20.0


class Meeting(Ranks):
    """One of several ranks, to be entered once. The ranks of a host have consecutive numbers."""

    def __init__(
        self, rank: int, size: int, local_rank: int, local_size: int, address: str
    ) -> None:
        self.rank, self.size, self.local_size, self._address = rank, size, local_size, address
        self._lowest_here = rank - local_rank
        here = range(self._lowest_here, self._lowest_here + local_size)
        self._watched = sorted(({0, *here} if rank else {*range(size)}) - {rank})
        self._heard: dict[int, tuple[bytes, float]] = {}  # the last sign of life, and since when
        self._failure: OtherRankError | None = None  # why all ranks end, this one's error too
        self._terminated: float | None = None  # when SIGTERM came
        self._is_ending = self._is_lost = False
        self._turn = self._beats = 0
        self._count = ("", 0, 0)
        self._progress: Progress | None = None
        self._handler: Any = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="ranks", daemon=True)

    def __enter__(self) -> Ranks:
        """Wait for all ranks; raise `FailedError` if one does not come within 300 seconds."""
        timeout = timedelta(seconds=_MEET_SECONDS)
        # After a restart by torchrun, the store may still hold what the ranks said before.
        prefix = f"llamaconv/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        try:
            with ThreadPool(1) as pool:  # torch's own wait cannot be interrupted
                found = rendezvous("env://", self.rank, self.size, timeout=timeout)
                self._store = PrefixStore(prefix, pool.apply(next, [found])[0])
            self._beat()
            self._store.set(f"host/{self.rank}", json.dumps(socket.gethostname()))
            hosts = [self._read("host", rank, _MEET_SECONDS) for rank in range(self.size)]
        except RuntimeError as error:
            raise FailedError(
                f"rank {self.rank} of {self.size} found no store at {self._address}: {_line(error)}"
            ) from error
        where = [f" on {host}" if len(set(hosts)) > 1 else "" for host in hosts]
        self._names = [f"rank {rank}{host}" for rank, host in enumerate(where)]
        if threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGTERM, self._terminate)
        self._thread.start()
        return self

    def _terminate(self, *_: Any) -> None:
        self._terminated = self._terminated or time.monotonic()

    def all_gather(self, value: Any) -> list[Any]:
        """Return each rank's ``value``, by rank; see `Ranks.all_gather`."""
        # Rank 0 reads the value of each rank and publishes them as one list.
        self._turn += 1
        with self._store_errors():
            self._beat()
            self._store.set(f"value {self._turn}/{self.rank}", json.dumps(value))
            if self.first:
                everyone = range(self.size)
                values = [self._read(f"value {self._turn}", rank) for rank in everyone]
                self._store.set(f"values {self._turn}/0", json.dumps(values))
                self._listen()
                self._draw()
            return list(self._read(f"values {self._turn}", 0))

    def broadcast(self, value: Any = None) -> Any:
        """Return rank 0's ``value``."""
        self._turn += 1
        with self._store_errors():
            if self.first:
                self._store.set(f"value {self._turn}/0", json.dumps(value))
            return self._read(f"value {self._turn}", 0)

    def _read(self, key: str, rank: int, seconds: float = float("inf")) -> Any:
        """Return what ``rank`` published under ``key``, as soon as it does."""
        if not self._wait(lambda: self._store.check([f"{key}/{rank}"]), seconds):
            raise FailedError(
                f"rank {self.rank} waited {seconds:.0f} s for rank {rank}; WORLD_SIZE is "
                f"{self.size}: unset it to convert with one process"
            )
        return json.loads(self._store.get(f"{key}/{rank}"))

    def _wait(self, is_done: Callable[[], bool], seconds: float) -> bool:
        """Poll, since torch's own waits cannot be interrupted; return whether it ``is_done``."""
        limit, pause = time.monotonic() + seconds, 0.002
        while not is_done():
            if not self._is_ending:
                self.raise_if_failed()
                self._draw()
            if time.monotonic() > limit:
                return False
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
        return True

    def raise_if_failed(self) -> None:
        """Raise `OtherRankError` if the conversion ends."""
        if self._failure is not None:
            raise self._failure

    @property
    def reports_errors(self) -> bool:
        """Whether this rank prints errors. Exactly one rank does."""
        # The first of those that are left does; each, as long as the ranks have not met.
        return self._failure is None or {*range(self.rank)} <= {*self._failure.dead}

    def counted(self, progress: Progress | None) -> Progress:
        """Return a function that counts; rank 0 calls ``progress`` with the sums."""
        self._progress = progress if self.first else None

        def count(step: str, done: int, total: int) -> None:
            self.raise_if_failed()
            self._count = step, done, total
            self._draw()

        return count

    def _draw(self) -> None:
        step, done, total = self._count
        if self._progress is not None and step:
            beats = [json.loads(beat) for beat, _ in list(self._heard.values())]
            done += sum(its_done for _, its_step, its_done in beats if its_step == step)
            self._progress(step, min(done, total), total)

    def _watch(self) -> None:
        with suppress(OtherRankError), self._store_errors():
            while not self._over.wait(_BEAT_SECONDS):
                self._beat()
                self._listen()

    def _beat(self) -> None:
        """Give a sign of life: a number that grows, and what this rank has done."""
        self._beats += 1
        self._store.set(f"beat/{self.rank}", json.dumps([self._beats, *self._count[:2]]))

    def _listen(self) -> None:
        """Learn whether the conversion ends, from other ranks, from their silence or by SIGTERM."""
        if self._failure is None and self._store.check(["failed"]):
            self._failure = OtherRankError(*json.loads(self._store.get("failed")))
        now = time.monotonic()
        beats = self._store.multi_get([f"beat/{rank}" for rank in self._watched])
        for rank, beat in zip(self._watched, beats, strict=True):
            if rank not in self._heard or self._heard[rank][0] != beat:
                self._heard[rank] = beat, now
        if self._failure is not None or self._is_ending:
            return
        silent, seconds = self._silent(now - _SILENT_SECONDS), _SILENT_SECONDS
        if self._terminated is not None:
            # The first second does not count: what a rank said before it died may be heard then.
            silent, seconds = self._silent(self._terminated + 2 * _BEAT_SECONDS), _DEAD_SECONDS
            if not silent:
                self._report(130, [f"{self._names[self.rank]}: {INTERRUPTED}"])
            elif now < self._terminated + _DEAD_SECONDS:
                return
        if silent:
            end = (
                f"has died: no sign of life for {seconds:.0f} s (killed, perhaps for want of "
                "memory, or its host was lost); the target was not changed"
            )
            self._report(1, [f"{self._names[rank]} {end}" for rank in silent], silent)

    def _silent(self, since: float) -> list[int]:
        """Return the watched ranks that have not ended, and gave no sign of life ``since``."""
        silent = [rank for rank in self._watched if self._heard[rank][1] < since]
        return [rank for rank in silent if not self._store.check([f"ended/{rank}"])]

    def _report(self, status: int, messages: list[str], dead: Sequence[int] = ()) -> None:
        """Publish why the conversion ends; the first report counts for all ranks."""
        first = self._store.compare_set("failed", "", json.dumps([status, messages, dead]))
        self._failure = OtherRankError(*json.loads(first))

    def abort(self, error: BaseException) -> None:
        """Publish why the conversion ends, unless another rank did; see `Ranks.abort`."""
        if self._is_ending:
            return
        self._is_ending = True
        with suppress(OtherRankError), self._store_errors():
            if self._failure is None:
                status, messages = 1, [f"{type(error).__name__}: {_line(error)}"]
                if isinstance(error, LlamaconvError):
                    status, messages = error.status, [each.message for each in error.problems]
                if isinstance(error, KeyboardInterrupt):
                    status, messages = 130, [INTERRUPTED]
                self._report(status, [f"{self._names[self.rank]}: {text}" for text in messages])
            if self.first:
                self._wait_for_end()

    def _wait_for_end(self) -> None:
        """Wait until the other ranks no longer write, except for the dead."""
        away = {self.rank, *(self._failure.dead if self._failure else ())}
        keys = [f"ended/{rank}" for rank in range(self.size) if rank not in away]
        self._wait(lambda: not keys or self._store.check(keys), _END_SECONDS)

    def __exit__(self, *raised: Any) -> None:
        error = raised[1]
        if error is not None:
            self.abort(error)
        self._is_ending = True
        with suppress(OtherRankError), self._store_errors():
            self._store.set(f"ended/{self.rank}", "")
            # The store may end with this process, and torchrun terminates rank 0 once another ends.
            if error is None or self.rank:
                self._wait_for_end()
        self._over.set()
        self._thread.join(2 * _BEAT_SECONDS)
        if self._handler is not None:
            # torchrun terminates the ranks that end last; let them keep their own exit status.
            signal.signal(signal.SIGTERM, signal.SIG_IGN if error else self._handler)
        if self._is_lost and error is not None:
            # That rank 0 has removed the folder, for one, only follows from the lost store.
            self.raise_if_failed()

    @contextmanager
    def _store_errors(self) -> Iterator[None]:
        """Turn an error of the store into the end of the conversion."""
        try:
            yield
        except RuntimeError as error:
            if self._failure is None:
                self._is_lost = True
                message = (
                    f"rank 0 or its torchrun, which keeps the store at {self._address}, was lost "
                    f"({_line(error)}); the target was not changed"
                )
                # One rank of each host reports it, as if all on the hosts before were dead.
                self._failure = OtherRankError(1, [message], range(self._lowest_here))
            raise self._failure from error


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
