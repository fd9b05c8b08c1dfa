r"""The processes that torchrun started, or this one alone.

Every rank opens the source, makes the same plan and writes its share of the target's files. Then
each compares what another rank wrote with the source as it sees it. Only small values pass between
ranks. `meeting` has several ranks; `Ranks` itself is a world of one.

The output is byte-for-byte the same as from one process, whatever the number of ranks. Only the
timestamp in the receipt differs. Each rank has the exit status of one process; torchrun's own is 1
after a failure. If a rank fails or dies, all ranks of its host end within seconds, the reason is printed
once, the target is unchanged, and the next run continues from what was written.

Several hosts need to share a filesystem and nothing else. On host I of N (the same but for I)::

    torchrun --nnodes N --node-rank I --master-addr NODE0 --master-port 29400 --nproc-per-node 4 \
        -m llamaconv convert /shared/Llama-3.1-70B /shared/Llama-3.1-70B-dcp --shards 8

More ranks than files do not help: a DCP has up to 64 files per row chunk (``--shards``), a Hugging
Face folder one per ``--max-shard-size``, and Meta's format ``--shards``.

405B on several hosts, calculated: all ranks together read and write 812 GB, and the checks read both
sides again. At 2 GB/s per host and direction, writing takes 7 minutes on one host and checking 14; on
eight hosts they take 51 and 102 seconds.

Limit: no rank continues the work of another. If one fails or dies, the conversion ends.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from llamaconv.report.errors import FailedError, Problem, RefusedError
from llamaconv.report.progress import Progress, no_progress


class OtherRankError(FailedError):
    """Another rank ended the conversion; ``dead`` are the ranks that cannot report it."""

    def __init__(self, status: int, messages: Sequence[str], dead: Sequence[int] = ()) -> None:
        super().__init__(map(Problem, messages))
        self.status, self.dead = status, dead


class Ranks:
    """A world of one rank. A context manager: leaving it by an exception ends all ranks.

    Attributes:
        rank: This rank's number, from 0.
        size: The number of ranks.
        local_size: The number of ranks on this host, which share its CPUs.
    """

    rank, size, local_size = 0, 1, 1

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which creates the target's folder and puts it in place."""
        return self.rank == 0

    @property
    def threads(self) -> int:
        """How many threads this rank works with if nobody says: one per CPU of its share, at most 4."""
        return min(4, max(1, (os.cpu_count() or 1) // self.local_size))

    @property
    def reports_errors(self) -> bool:
        """Whether this rank prints errors. After the ``with`` block, exactly one rank does."""
        return True

    def share(self, sizes: Sequence[int], shift: int = 0) -> list[int]:
        """Return the indices of this rank's items; every rank gets about the same bytes.

        Args:
            sizes: Bytes per item; equal on all ranks.
            shift: Pass each share on by this many ranks, so that no rank checks what it wrote.
        """
        loads = [0] * self.size
        mine = []
        for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
            rank = loads.index(min(loads))
            loads[rank] += sizes[index]
            if (rank + shift) % self.size == self.rank:
                mine.append(index)
        return sorted(mine)

    def all_gather(self, value: Any) -> list[Any]:
        """Return each rank's ``value``, by rank; waits for the slowest rank.

        Args:
            value: Anything that JSON can represent.

        Raises:
            OtherRankError: If another rank failed or died.
        """
        return [value]

    def broadcast(self, value: Any = None) -> Any:
        """Return rank 0's ``value`` on every rank; see `all_gather`."""
        return value

    def raise_if_failed(self) -> None:
        """Raise `OtherRankError` if another rank is known to have failed or died."""

    def counted(self, progress: Progress | None) -> Progress:
        """Return a function to call instead of ``progress``, which gets the sums on rank 0.

        The function also calls `raise_if_failed`.
        """
        return progress or no_progress

    def abort(self, error: BaseException) -> None:
        """End all ranks because of ``error``. Call it once this rank no longer writes.

        Rank 0 waits until no rank writes, for 20 seconds at most.
        """

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *raised: Any) -> None:
        pass


ALONE = Ranks()


def from_environment() -> Ranks:
    """Return the ranks that torchrun started, or `ALONE` if WORLD_SIZE is unset or 1.

    Raises:
        RefusedError: If RANK, MASTER_ADDR or MASTER_PORT do not fit WORLD_SIZE.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return ALONE
    try:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        address = f"{os.environ['MASTER_ADDR']}:{int(os.environ['MASTER_PORT'])}"
        if not 0 <= rank < size or local_size < 1:
            raise ValueError(f"rank {rank} of {size}")
    except (KeyError, ValueError) as error:
        raise RefusedError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']!r}, but RANK, MASTER_ADDR or MASTER_PORT do "
            f"not fit it ({type(error).__name__}: {error}); start several ranks with torchrun, or "
            "unset WORLD_SIZE for one process"
        ) from None
    # If the store is lost, torch would log its C++ stack; our one line is enough.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from llamaconv.ranks.meeting import Meeting

    return Meeting(rank, size, local_rank, local_size, address)
