"""The ranks of one conversion: the processes that torchrun started, or this one alone.

Every rank opens the source, makes the same plan and writes its share of the target's files; only
small values pass between ranks, and the weights go through the filesystem alone. `Ranks` is a
world of one, which needs nothing; `meeting` has the world of several.

Limit: ranks do not take over from each other. Where one fails or dies, the conversion ends.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any

from llamaconv.problems import FailedError, Problem, RefusedError

Progress = Callable[[str, int, int], None]
"""What is being done ("write" or "verify"), bytes done, bytes in all. Called from threads."""


class OtherRankError(FailedError):
    """Another rank ended the conversion; ``status`` is the exit status of all."""

    def __init__(self, messages: Iterable[str], status: int) -> None:
        super().__init__(map(Problem, messages))
        self.status = status


class Ranks:
    """A world of one rank. A context manager: leaving it by an error tells the other ranks."""

    rank = 0
    size = 1
    local_size = 1
    """Ranks on this host, which share its processors."""

    @property
    def first(self) -> bool:
        """Whether this is the rank that makes the target's folder and puts it in place."""
        return self.rank == 0

    @property
    def reports_errors(self) -> bool:
        """Whether this rank tells the user of an error, so that it is said once."""
        return True

    def share(self, sizes: Sequence[int], shift: int = 0) -> list[int]:
        """The places in ``sizes`` (bytes) that fall to this rank; every rank gets about the same.

        The longest first, each to the rank with the least. ``shift`` hands every share on by so
        many ranks: those who check are not those who wrote.
        """
        loads = [(0, rank) for rank in range(self.size)]
        mine = []
        for place in sorted(range(len(sizes)), key=lambda place: -sizes[place]):
            filled, rank = heapq.heappop(loads)
            heapq.heappush(loads, (filled + sizes[place], rank))
            if (rank + shift) % self.size == self.rank:
                mine.append(place)
        return sorted(mine)

    def all_gather(self, value: Any) -> list[Any]:
        """The ``value`` of every rank, by rank. Values are what JSON can carry.

        Waits for the slowest rank. Raises `OtherRankError` where one failed or died.
        """
        return [value]

    def broadcast(self, value: Any = None) -> Any:
        """The ``value`` of rank 0, on every rank; raises as `all_gather` does."""
        return value

    def raise_if_failed(self) -> None:
        """Raises `OtherRankError` where another rank has failed or died; costs nothing."""

    def counted(self, progress: Progress | None) -> Progress | None:
        """``progress`` with the bytes of all ranks, called on rank 0 only.

        Every call of it also calls `raise_if_failed`.
        """
        return progress

    def abort(self, error: BaseException) -> None:
        """Tells the others that this rank ends with ``error``, where they do not know yet.

        To be called when this rank touches the target no more. On rank 0 waits, some seconds
        at most, until that is so of every rank.
        """

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass


ALONE = Ranks()


def from_environment() -> Ranks:
    """The ranks that torchrun started, by RANK and WORLD_SIZE; without these, this process alone.

    Raises `RefusedError` where the environment says half of it.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return ALONE
    try:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        if not 0 <= rank < size or local_size < 1:
            raise ValueError(f"rank {rank} of {size}")
    except (KeyError, ValueError) as error:
        raise RefusedError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']!r}, but RANK, MASTER_ADDR or MASTER_PORT do "
            f"not fit it ({type(error).__name__}: {error}); start several ranks with torchrun, or "
            "unset WORLD_SIZE for one process"
        ) from None
    # Where the store goes, torch would log its C++ stack; one line of ours says it.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from llamaconv.ranks.meeting import Meeting

    return Meeting(rank, size, local_size, f"{host}:{port}")
