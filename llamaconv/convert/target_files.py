"""All files of a target by its format: the weights, and the small files next to them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from llamaconv.checkpoint.checkpoint import Format
from llamaconv.checkpoint.tensors import TensorInfo
from llamaconv.convert.destination import Destination
from llamaconv.convert.joined import joined_tensors
from llamaconv.convert.output import CountedBlocks
from llamaconv.convert.small_files import copy_small_files
from llamaconv.convert.to_dcp import write_dcp
from llamaconv.convert.to_huggingface import write_config, write_huggingface
from llamaconv.convert.to_meta import write_meta, write_params
from llamaconv.model.names import whole
from llamaconv.plan.plan import Plan
from llamaconv.ranks import Ranks

Digests = dict[str, list[str]]
How = tuple[
    CountedBlocks, int, Ranks
]  # where the bytes come from, writer threads, who shares the files


def write_target(
    target: Destination, plan: Plan, blocks: CountedBlocks, workers: int, ranks: Ranks
) -> Digests:
    """Write this rank's files of the target, and on rank 0 the small files.

    Args:
        target: Where to write.
        plan: The conversion, without errors.
        blocks: Where the target's bytes come from.
        workers: Writer threads of this rank.
        ranks: Who shares the work.

    Returns:
        The xxh3-128 digest of every piece by tensor, of all ranks.

    Raises:
        OSError: The disk failed; and whatever ``blocks`` raises.
    """
    if not ranks.first:
        return _weights(target, plan, blocks, workers, ranks)
    if plan.source.remote is None:
        copy_small_files(target, plan.small_files)
        return _weights(target, plan, blocks, workers, ranks)
    stop = threading.Event()
    with ThreadPoolExecutor(1) as aside:
        # Small files of another machine take as long as some of the weights.
        job = aside.submit(copy_small_files, target, plan.small_files, plan.source.remote, stop)
        try:
            digests = _weights(target, plan, blocks, workers, ranks)
            job.result()
        finally:
            stop.set()
    return digests


def _weights(
    target: Destination, plan: Plan, blocks: CountedBlocks, workers: int, ranks: Ranks
) -> Digests:
    tensors = [TensorInfo(move.target_name, move.dtype, move.shape) for move in plan.stored]
    return WRITERS[plan.target.format](target, plan, tensors, (blocks, workers, ranks))


def _dcp(target: Destination, plan: Plan, tensors: list[TensorInfo], how: How) -> Digests:
    joined = joined_tensors(plan)
    # A fused tensor stands where the first of its parts would.
    whole_ones = {
        whole(t.name): joined[whole(t.name)].tensor if whole(t.name) in joined else t
        for t in tensors
    }
    return write_dcp(target, [*whole_ones.values()], plan.target.shards, *how, joined, plan.values)


def _meta(target: Destination, plan: Plan, tensors: list[TensorInfo], how: How) -> Digests:
    *_, ranks = how
    if ranks.first:
        write_params(target, plan.ready()[0])
    return write_meta(target, tensors, plan.target.shards, *how)


def _huggingface(target: Destination, plan: Plan, tensors: list[TensorInfo], how: How) -> Digests:
    *_, ranks = how
    if ranks.first:
        write_config(target, plan)
    return write_huggingface(target, tensors, plan.target.max_shard_size, *how)


WRITERS: dict[Format, Callable[[Destination, Plan, list[TensorInfo], How], Digests]] = {
    "huggingface": _huggingface,
    "meta": _meta,
    "dcp": _dcp,
}
