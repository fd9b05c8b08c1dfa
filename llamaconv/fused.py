"""The fused ``wqkv`` that some TorchTitan nightlies of 2026 saved, taken apart.

One matrix holds, for each kv head, the query heads that share it, then its key head, then its
value head, each ``head_dim`` rows: ``(n_kv_heads, n_heads / n_kv_heads + 2, head_dim, dim)``
(TorchTitan's FusedQKVLinear, 0.3.0, torchtitan/models/common/attention.py; released versions
split it themselves when they save). So wq, wk and wv are runs of its rows, and no byte is moved
to take it apart; but how long the runs are is in no checkpoint, the parameters have to say.
"""

from __future__ import annotations

import re
from dataclasses import replace

from llamaconv import keys
from llamaconv.opened import Checkpoint
from llamaconv.params import LlamaParams
from llamaconv.pieces import TensorInfo
from llamaconv.problems import Problem

_WQKV = re.compile(r"(?:model\.)?layers\.([0-9]{1,9})\.attention\.(?:qkv_linear\.)?wqkv\.weight")


def is_fused(name: str) -> bool:
    return _WQKV.fullmatch(name) is not None


def runs(params: LlamaParams) -> dict[str, list[tuple[int, int]]]:
    """The rows of a fused matrix that are those of each role, in order."""
    group = params.n_heads // params.n_kv_heads
    size = params.head_dim
    starts = [head * (group + 2) * size for head in range(params.n_kv_heads)]
    return {
        "wq": [(start, start + group * size) for start in starts],
        "wk": [(start + group * size, start + (group + 1) * size) for start in starts],
        "wv": [(start + (group + 1) * size, start + (group + 2) * size) for start in starts],
    }


def take_apart(source: Checkpoint) -> Checkpoint:
    """``source`` with wq, wk and wv in place of each fused matrix; needs its parameters."""
    params, naming = source.params, source.naming
    if params is None or naming is None or not any(map(is_fused, source.tensors)):
        return source
    tensors: dict[str, TensorInfo] = {}
    problems: list[Problem] = []
    for name, tensor in source.tensors.items():
        match = _WQKV.fullmatch(name)
        if match is None:
            tensors[name] = tensor
            continue
        expected = (params.q_rows + 2 * params.kv_rows, params.dim)
        if tensor.shape != expected:
            problems.append(
                Problem(
                    f"{name}: shape {list(tensor.shape)}, {list(expected)} expected of "
                    f"{params.n_heads} heads and {params.n_kv_heads} kv heads of "
                    f"{params.head_dim}; the parameters are of another model",
                    (name,),
                )
            )
            continue
        for role, rows in runs(params).items():
            part = keys.ROLES[role].in_naming(naming, int(match[1]))
            assert part is not None
            tensors[part] = replace(tensor.rows_of(part, rows), stored=name)
    return replace(source, tensors=tensors, problems=(*source.problems, *problems))
