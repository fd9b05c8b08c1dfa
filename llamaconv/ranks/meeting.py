"""A world of several ranks, which meet at the store that torchrun keeps for them.

torch.distributed brings them together (its env:// rendezvous gives the TCPStore) and small values
pass through that store, as JSON: whoever reaches the port can run no code by it. There is no
process group. A gloo collective waits where neither a signal nor another rank's failure can end
it, its timeout would limit how long a rank may write, and between hosts it has to guess a network
interface; a conversion has no tensors to exchange that would be worth that.

Limit: the store is the one thing that cannot be lost. Where its host goes, every rank ends.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any

from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from llamaconv.problems import INTERRUPTED, FailedError, LlamaconvError
from llamaconv.ranks import OtherRankError, Progress, Ranks
from llamaconv.ranks.watch import BEAT_SECONDS, Failure, Watch, notice_lost_host

# Until all are there, and until all have stopped.
_MEET_SECONDS = 300.0
_STOP_SECONDS = 20.0


class Meeting(Ranks):
    """One of several ranks; see `Ranks` for what each method promises. To be used once.

    Entering raises `FailedError` where the others do not come. SIGTERM is an interruption
    inside, and ignored after an error.
    """

    _watch: Watch

    def __init__(self, rank: int, size: int, local_size: int, place: str) -> None:
        self.rank, self.size, self.local_size = rank, size, local_size
        self.place = place
        self._turn = 0
        self._met = self._ending = self._lost = False
        self._progress: Progress | None = None
        self._count = self._drawn = ("", 0, 0)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep_watch, name="ranks", daemon=True)
        self._handler: Any = None

    def __enter__(self) -> Ranks:
        try:
            store = self._find_store()
            notice_lost_host(int(self.place.rpartition(":")[2]))
            # After a restart of torchrun's the same store may be there, with what was said before.
            restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            self._watch = Watch(PrefixStore(f"llamaconv/{restart}", store), self.rank, self.size)
            self._watch.meet(_MEET_SECONDS)
        except RuntimeError as error:
            raise FailedError(
                f"rank {self.rank} of {self.size} found no store at {self.place}: {_line(error)}"
            ) from error
        self._met = True
        if threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGTERM, self._terminated)
        self._thread.start()
        return self

    def _find_store(self) -> Store:
        """The store of torchrun; a signal ends the wait for it, which in torch's C++ it could not."""
        found: list[Store | Exception] = []

        def find() -> None:
            try:
                timeout = timedelta(seconds=_MEET_SECONDS)
                found.append(next(rendezvous("env://", self.rank, self.size, timeout=timeout))[0])
            except Exception as error:
                found.append(error)

        thread = threading.Thread(target=find, daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(0.05)
        if isinstance(found[0], Exception):
            raise found[0]
        return found[0]

    def _keep_watch(self) -> None:
        with self._storing(quiet=True):
            while not self._over.is_set():
                self._watch.find_dead(BEAT_SECONDS)
                self._watch.beat()
                self._watch.listen()

    @property
    def reports_errors(self) -> bool:
        if self.first or not self._met:
            return True
        failure = self._watch.failure
        return failure is not None and 0 in self._watch.dead and failure.by == self.rank

    def all_gather(self, value: Any) -> list[Any]:
        # Rank 0 alone reads from each; it hands on what all have said in one piece.
        self._turn += 1
        key = f"all_gather/{self._turn}"
        store = self._watch.store
        with self._storing():
            self._watch.beat()
            if self.rank:
                store.set(f"{key}/{self.rank}", json.dumps(value))
                return list(json.loads(self._read(f"{key}/0")))
            others = [self._read(f"{key}/{rank}") for rank in range(1, self.size)]
            values = [json.loads(json.dumps(value)), *map(json.loads, others)]
            store.set(f"{key}/0", json.dumps(values))
            self._watch.listen()
            self._draw()
            return values

    def broadcast(self, value: Any = None) -> Any:
        self._turn += 1
        key = f"broadcast/{self._turn}"
        with self._storing():
            if self.first:
                self._watch.store.set(key, json.dumps(value))
                return value
            return json.loads(self._read(key))

    def _read(self, key: str) -> bytes:
        """What another rank says under ``key``, once it does."""
        pause = 0.002
        while not self._watch.store.check([key]):
            self.raise_if_failed()
            self._draw()
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
        return self._watch.store.get(key)

    def raise_if_failed(self) -> None:
        if self._watch.failure is not None:
            raise _other(self._watch.failure)

    def counted(self, progress: Progress | None) -> Progress:
        self._progress = progress if self.first else None

        def count(step: str, done: int, total: int) -> None:
            self.raise_if_failed()
            self._count = (step, done, total)
            self._watch.own_count = (step, done)
            self._draw()

        return count

    def _draw(self) -> None:
        step, done, total = self._count
        if self._progress is None or not step:
            return
        done += sum(n for its_step, n in list(self._watch.counts.values()) if its_step == step)
        if (step, done, total) != self._drawn:
            self._drawn = (step, done, total)
            self._progress(step, min(done, total), total)

    def abort(self, error: BaseException) -> None:
        if self._ending:
            return
        self._ending = True
        watch = self._watch
        with self._storing(quiet=True):
            if watch.failure is None:
                # torchrun ends every rank when one has died: that death is the reason.
                watch.find_dead(0)
            if watch.failure is None:
                status, messages = _told(error)
                name = watch.name(self.rank)
                watch.report(self.rank, status, [f"{name}: {message}" for message in messages])
            if self.first:
                watch.wait(lambda: watch.ended(range(1, self.size)), _STOP_SECONDS)
            else:
                watch.end()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        watch = self._watch
        with self._storing(quiet=True):
            if error is not None:
                self.abort(error)
            watch.end()
            if self.first:
                # This process may keep the store; let the others read what they were told.
                watch.wait(lambda: watch.ended(range(1, self.size)), _STOP_SECONDS)
                time.sleep(0.1 if error else 0)  # until they know that it has ended, too
            elif error is not None:
                # Were this one gone before, torchrun would end rank 0 while it clears up.
                watch.wait(lambda: watch.ended([0]), 3 * _STOP_SECONDS)
        self._over.set()
        self._thread.join(2 * BEAT_SECONDS)
        watch.close()
        if self._handler is not None:
            # torchrun terminates the ranks that end last; let them end with their own status.
            signal.signal(signal.SIGTERM, signal.SIG_IGN if error else self._handler)
        failure = watch.failure
        if failure is None or error is None or failure.status == 130:
            return
        # torchrun's signal, or a folder that has gone, only follow from the reason.
        if self._lost or isinstance(error, KeyboardInterrupt):
            raise _other(failure) from None

    def _terminated(self, number: int, frame: FrameType | None) -> None:
        # Where a rank has failed, this one ends by itself, and clears up undisturbed.
        if self._watch.failure is None and not self._ending:
            raise KeyboardInterrupt

    @contextmanager
    def _storing(self, quiet: bool = False) -> Iterator[None]:
        """Turns an error of the store into the end of the conversion."""
        try:
            yield
        except RuntimeError as error:
            self._lose(error)
            if not quiet:
                self.raise_if_failed()

    def _lose(self, error: RuntimeError) -> None:
        """The store has gone: the first of this host's ranks that are left says so."""
        self._lost = True
        watch = self._watch
        here = watch.here()
        if 0 not in here:
            watch.dead.add(0)
        if watch.failure is None:
            reason = f"rank 0 or its torchrun, which keeps the store at {self.place}, has gone"
            message = f"{reason} ({_line(error)}); the target is as it was before"
            watch.failure = Failure(0, min(here), 1, [message])


def _other(failure: Failure) -> OtherRankError:
    return OtherRankError(failure.messages, failure.status)


def _told(error: BaseException) -> tuple[int, list[str]]:
    """Exit status and messages for the other ranks."""
    if isinstance(error, LlamaconvError):
        return error.status, [problem.message for problem in error.problems]
    if isinstance(error, KeyboardInterrupt):
        return 130, [INTERRUPTED]
    return 1, [f"{type(error).__name__}: {_line(error)}"]


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
