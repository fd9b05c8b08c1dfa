"""The plan: every move from a source checkpoint to a target, with all problems at once.

The preview is the program: `convert` executes the very object that is shown here. Made from
headers alone, without torch; weights are read only where a decision hangs on them (a tied
head that is also stored, biases a target has no place for).

Limit: a plan is a value for one target; change an option and make another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from math import prod
from typing import Any, Literal

from llamaconv import keys
from llamaconv.params import LlamaParams
from llamaconv.pieces import DTYPE_BYTES, WEIGHT_DTYPES, Checkpoint, PieceReader, TensorInfo
from llamaconv.problems import Problem, RefusedError, some, warning
from llamaconv.tables import Table, size

Operation = Literal["copy", "reorder", "cast", "tie", "drop"]

# What a target option may be; the command line and the notebook offer the same.
CHOICES: dict[str, tuple[str, ...]] = {
    "to": ("dcp",),
    "generation": ("titan-0.3", "titan-0.2", "titan-2024"),
    "rope": ("interleaved", "half_split"),
    "dtype": ("keep", "float32", "bfloat16", "float16"),
    "tie": ("auto", "embedding", "head", "untie"),
}

# A process with torch imported (measured 225 to 245 MB, torch 2.13, Linux), and two buffers of
# a block for each of a few writers.
PEAK_MEMORY_BYTES = 350_000_000


@dataclass(frozen=True)
class Target:
    """What to make of a checkpoint; the options of the command line by the same names.

    Raises `RefusedError` for a value that is not offered.
    """

    to: str = "dcp"
    generation: str = "titan-0.3"
    rope: keys.Layout = "interleaved"
    dtype: str = "keep"
    shards: int = 1
    tie: str = "auto"

    def __post_init__(self) -> None:
        problems = [
            Problem(f"{option} is {value!r}; one of {', '.join(CHOICES[option])} was expected")
            for option in CHOICES
            if (value := getattr(self, option)) not in CHOICES[option]
        ]
        if type(self.shards) is not int or not 1 <= self.shards <= 65536:
            problems.append(
                Problem(f"shards is {self.shards!r}; a number from 1 to 65536 was expected")
            )
        if problems:
            raise RefusedError(problems)


@dataclass(frozen=True)
class Move:
    """One row of the plan: what becomes of one source tensor, and why.

    ``dtype`` and ``shape`` are the target's; ``heads`` counts the heads whose rows are
    re-ordered, None for other operations. A dropped tensor has no ``target``.
    """

    source: str
    target: str | None
    operation: Operation
    dtype: str
    shape: tuple[int, ...]
    reason: str
    heads: int | None = None

    @property
    def writes(self) -> str:
        """The target's name, of a move that has one (those of `Plan.written`)."""
        assert self.target is not None
        return self.target

    @property
    def nbytes(self) -> int:
        """Bytes of the target tensor; 0 for a dropped one."""
        return prod(self.shape) * DTYPE_BYTES[self.dtype] if self.target else 0


@dataclass(frozen=True, repr=False)
class Plan:
    """Everything that a conversion will do, or why it will not.

    ``unknown`` and ``missing`` are the names that fit nowhere and the names that a Llama of
    these parameters needs. Every source tensor is moved, dropped on purpose, or unknown.
    """

    source: Checkpoint
    target: Target
    params: LlamaParams | None
    moves: tuple[Move, ...]
    problems: tuple[Problem, ...]
    unknown: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()

    @property
    def errors(self) -> list[Problem]:
        return [problem for problem in self.problems if problem.level == "error"]

    @cached_property
    def written(self) -> tuple[Move, ...]:
        """The moves that write a tensor."""
        return tuple(move for move in self.moves if move.target is not None)

    @property
    def bytes_to_read(self) -> int:
        return sum(self.source.tensors[move.source].nbytes for move in self.written)

    @property
    def bytes_to_write(self) -> int:
        return sum(move.nbytes for move in self.written)

    @property
    def counts(self) -> dict[str, int]:
        """How many source tensors fall in each class, and how many are missing."""
        moved = {move.source for move in self.written}
        dropped = {move.source for move in self.moves} - moved
        return {
            "moved": len(moved),
            "dropped": len(dropped),
            "unknown": len(self.unknown),
            "missing": len(self.missing),
        }

    def check(self) -> None:
        """Raises `RefusedError` with every error, where there is one."""
        if self.errors:
            raise RefusedError(self.errors)

    def to_json(self) -> dict[str, Any]:
        return {
            "source": str(self.source.path),
            "target": asdict(self.target),
            "params": self.params.to_json() if self.params else None,
            "moves": [
                {
                    "source": move.source,
                    "target": move.target,
                    "operation": move.operation,
                    "dtype": move.dtype,
                    "shape": list(move.shape),
                    "reason": move.reason,
                }
                for move in self.moves
            ],
            "counts": self.counts,
            "problems": [problem.message for problem in self.errors],
            "warnings": [p.message for p in self.problems if p.level == "warning"],
            "unknown": list(self.unknown),
            "missing": list(self.missing),
            "bytes_to_read": self.bytes_to_read,
            "bytes_to_write": self.bytes_to_write,
            "peak_memory_bytes": PEAK_MEMORY_BYTES,
        }

    def table(self, most: int = 60) -> Table:
        rows = [
            (
                move.source,
                move.target or "—",
                move.operation,
                move.dtype,
                " × ".join(map(str, move.shape)),
                move.reason,
            )
            for move in self.moves
        ]
        columns = ("source", "target", "operation", "dtype", "shape", "why")
        return Table(columns, rows, caption=self.summary(), right=("shape",), most=most)

    def cost(self) -> Table:
        """Bytes to read and to write, and the memory at the peak, torch included."""
        operations = Counter(move.operation for move in self.moves)
        rows = [
            *((f"tensors: {operation}", number) for operation, number in operations.items()),
            ("bytes to read", size(self.bytes_to_read)),
            ("bytes to write", size(self.bytes_to_write)),
            ("memory at the peak, at most", size(PEAK_MEMORY_BYTES)),
        ]
        return Table(("cost", ""), rows, right=("",))

    def summary(self) -> str:
        target, counts = self.target, self.counts
        classes = ", ".join(f"{number} {name}" for name, number in counts.items() if number)
        state = f"; {len(self.errors)} problems, nothing will be written" if self.errors else ""
        return (
            f"{self.source.path.name} → {target.to} {target.generation}, {target.rope} rows, "
            f"dtype {target.dtype}: {classes or 'no tensors'}{state}"
        )

    def __repr__(self) -> str:
        return f"<Plan {self.summary()}>"

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def make_plan(source: Checkpoint, target: Target | None = None) -> Plan:
    """The plan from an opened checkpoint to a target. Never raises for a bad checkpoint."""
    planner = _Planner(source, target or Target())
    return planner.plan()


# Endings of tensors that belong to a quantised weight, and the schemes that write them.
_QUANTISED = {
    ".weight_scale_inv": "block-wise fp8",
    ".weight_scale": "fp8 or int8 (compressed-tensors)",
    ".input_scale": "fp8 (compressed-tensors)",
    ".weight_packed": "compressed-tensors",
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".scales": "GPTQ or AWQ",
    ".g_idx": "GPTQ",
    ".SCB": "bitsandbytes int8",
    ".absmax": "bitsandbytes 4 bit",
    ".quant_map": "bitsandbytes 4 bit",
}


class _Planner:
    """Sorts every source tensor into one class and collects what is wrong on the way."""

    def __init__(self, source: Checkpoint, target: Target) -> None:
        self.source = source
        self.target = target
        self.params = source.params
        self.problems = list(source.problems)
        self.moves: list[Move] = []
        self.unknown: list[str] = []
        self.missing: list[str] = []
        self.known: dict[tuple[str, int | None], TensorInfo] = {}

    def plan(self) -> Plan:
        if self.source.format != "huggingface":
            self.problems.append(_unreadable(self.source))
        else:
            self._sort_tensors()
            if self.params is not None:
                self._move_all(self.params)
                self._check_tensors(self.params)
        if self.target.rope != "interleaved":
            self.problems.append(
                warning(
                    "rope half_split keeps q and k rows as transformers has them; every TorchTitan "
                    "release turns interleaved pairs, so its model needs a rotate-half RoPE"
                )
            )
        return Plan(
            source=self.source,
            target=self.target,
            params=self.params,
            moves=tuple(self.moves),
            problems=tuple(self.problems),
            unknown=tuple(self.unknown),
            missing=tuple(self.missing),
        )

    def error(self, message: str, names: Iterable[str] = ()) -> None:
        self.problems.append(Problem(message, tuple(names)))

    # Sorting: every name is a role's, dropped on purpose, or unknown.

    def _sort_tensors(self) -> None:
        schemes: dict[str, list[str]] = {}
        for name, tensor in self.source.tensors.items():
            known = keys.identify(name, self.source.naming or "")
            if keys.is_computed(name):
                self._drop(tensor, "RoPE's angles: every model computes them anew")
            elif known and (self.params is None or (known[1] or 0) < self.params.n_layers):
                self.known[known[0].name, known[1]] = tensor
            else:
                self.unknown.append(name)
                for ending, scheme in _QUANTISED.items():
                    if name.endswith(ending):
                        schemes.setdefault(scheme, []).append(name)
        for scheme, names in schemes.items():
            self.error(
                f"{len(names)} tensors belong to quantised weights, scheme {scheme}: {some(names)}. "
                "They are not converted; use the repository's unquantised weights",
                names,
            )
        quantised = {name for names in schemes.values() for name in names}
        rest = [name for name in self.unknown if name not in quantised]
        if rest:
            self.error(f"{len(rest)} tensors fit no Llama: {some(rest)}{self._hint(rest)}", rest)

    def _hint(self, unknown: list[str]) -> str:
        beyond = [name for name in unknown if keys.identify(name, "huggingface")]
        if beyond and self.params:
            return (
                f". config.json says {self.params.n_layers} layers and these are of later ones: "
                "config and weights are of different models"
            )
        if all(keys.identify(f"model.{name}", "huggingface") for name in unknown):
            return ". They lack 'model.' in front: saved from LlamaModel, not LlamaForCausalLM"
        return ". They are of another model family, or of an extension that has to be merged first"

    def _drop(self, tensor: TensorInfo, reason: str) -> None:
        self.moves.append(Move(tensor.name, None, "drop", tensor.dtype, tensor.shape, reason))

    # Moving: every role that a complete Llama has, in the order of a forward pass.

    def _move_all(self, params: LlamaParams) -> None:
        sources = dict(self.known)
        ties = self._resolve_head(sources)
        for role, layer in keys.every(params):
            tensor = sources.get((role.name, layer))
            target = role.in_naming(self.target.generation, layer)
            if tensor is None:
                self.missing.append(role.in_naming("huggingface", layer) or role.name)
            elif target is not None:
                self._move(role, tensor, target, getattr(params, role.heads or "", None), ties)
        explained = {name for problem in self.source.problems for name in problem.names}
        lost = [name for name in self.missing if name not in explained]
        if lost:
            self.error(
                f"{len(lost)} tensors that a Llama of {params.n_layers} layers needs are "
                f"missing: {some(lost)}. {self._cause_of_missing()}",
                lost,
            )
        used = {move.source for move in self.moves}
        for (name, layer), tensor in self.known.items():
            if tensor.name not in used:
                self._leave_out(keys.ROLES[name], layer, tensor)

    def _cause_of_missing(self) -> str:
        if self.missing == ["lm_head.weight"]:
            return (
                "config.json says tie_word_embeddings false, so the head is not the embedding: the "
                "download is incomplete; if the model is tied after all, say so with --tie embedding"
            )
        return "The download is incomplete, or config.json is of another model"

    def _resolve_head(self, sources: dict[tuple[str, int | None], TensorInfo]) -> dict[str, str]:
        """Which tensor becomes the head and which the embedding; reasons by target role."""
        embedding, head = sources.get(("tok_embeddings", None)), sources.get(("output", None))
        assert self.params is not None
        tied, tie = self.params.tied, self.target.tie
        if tie in ("embedding", "head"):
            self.params = replace(self.params, tied=True)
        elif tie == "untie":
            self.params = replace(self.params, tied=False)
        if embedding is None or (head is None and not tied and tie != "embedding"):
            return {}
        if tie == "head" and head is None:
            self.error("--tie head: the source has no lm_head.weight to take; use --tie embedding")
            return {}
        if head is None:
            sources["output", None] = embedding
            return {"output": "tied to the embedding and not stored: written from it"}
        if tie == "embedding":
            sources["output", None] = embedding
            return {"output": "--tie embedding: written from the embedding"}
        if tie == "head":
            sources["tok_embeddings", None] = head
            return {"tok_embeddings": "--tie head: written from the head"}
        if tied and tie == "auto" and not _same_bytes(embedding, head):
            self.error(
                f"config.json ties the head to the embedding, but {head.name} and {embedding.name} "
                "differ. Choose: --tie embedding, --tie head, or --tie untie to keep both",
                (head.name, embedding.name),
            )
        return {}

    def _move(
        self,
        role: keys.Role,
        tensor: TensorInfo,
        target: str,
        heads: int | None,
        ties: dict[str, str],
    ) -> None:
        dtype = tensor.dtype if self.target.dtype == "keep" else self.target.dtype
        cast = f"{tensor.dtype} to {dtype}" if dtype != tensor.dtype else ""
        reorder = heads is not None and self.source.rope != self.target.rope
        operation: Operation
        if role.name in ties:
            operation, reason = "tie", ties[role.name] + (f"; {cast}" if cast else "")
        elif reorder:
            operation = "reorder"
            reason = f"{heads} heads, {self.source.rope} to {self.target.rope}"
            reason += f"; {cast}" if cast else ""
        elif cast:
            operation, reason = "cast", cast
        else:
            operation, reason = "copy", "same bytes"
        self.moves.append(
            Move(
                tensor.name,
                target,
                operation,
                dtype,
                tensor.shape,
                reason,
                heads if reorder else None,
            )
        )

    def _leave_out(self, role: keys.Role, layer: int | None, tensor: TensorInfo) -> None:
        if not role.optional:
            self._drop(tensor, f"--tie {self.target.tie}: replaced by the other")
            return
        self._drop(tensor, f"{self.target.generation} has no biases; all zero, so nothing is lost")
        if not _all_zero(tensor):
            self.error(
                f"{tensor.name}: a bias that is not zero; TorchTitan's Llama has no biases, so the "
                "target would compute something else",
                (tensor.name,),
            )

    # Checking: shapes by the table's formula, dtypes that are weights.

    def _check_tensors(self, params: LlamaParams) -> None:
        wrong: dict[tuple[str, tuple[int, ...]], list[str]] = {}
        dtypes: dict[str, list[str]] = {}
        for (name, _), tensor in self.known.items():
            if tensor.shape != keys.ROLES[name].shape(params):
                wrong.setdefault((name, tensor.shape), []).append(tensor.name)
            if tensor.dtype not in WEIGHT_DTYPES:
                dtypes.setdefault(tensor.dtype, []).append(tensor.name)
        for (name, shape), names in wrong.items():
            role = keys.ROLES[name]
            formula = ", ".join(f"{axis} = {getattr(params, axis)}" for axis in role.axes)
            self.error(
                f"{some(names, 3)}: shape {list(shape)}, {list(role.shape(params))} expected "
                f"({formula}, {params.n_heads} heads and {params.n_kv_heads} kv heads of "
                f"{params.head_dim}). config.json and the weights are of different models",
                names,
            )
        for dtype, names in dtypes.items():
            kind = (
                "a quantised scheme"
                if dtype.startswith(("float8", "int", "uint"))
                else "no weights"
            )
            self.error(
                f"{len(names)} tensors are stored as {dtype}, {kind}: {some(names, 3)}. "
                f"Weights are one of {', '.join(WEIGHT_DTYPES)}; use the unquantised ones",
                names,
            )


def _unreadable(source: Checkpoint) -> Problem:
    written = f", written by llamaconv as {source.generation}" if source.receipt else ""
    return Problem(
        f"{source.path}: this is a {source.format} checkpoint{written}, {source.rope} rows; it is "
        "not converted again. The source of a conversion is a Hugging Face folder"
    )


_COMPARED_BYTES = 1 << 22


def _same_bytes(one: TensorInfo, other: TensorInfo) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    with PieceReader() as reader:
        for first, last in _blocks(one):
            buffers = [bytearray((last - first) * one.row_bytes) for _ in range(2)]
            for tensor, buffer in zip((one, other), buffers, strict=True):
                reader.read_rows(tensor, first, last, memoryview(buffer))
            if buffers[0] != buffers[1]:
                return False
    return True


def _all_zero(tensor: TensorInfo) -> bool:
    with PieceReader() as reader:
        for first, last in _blocks(tensor):
            buffer = bytearray((last - first) * tensor.row_bytes)
            reader.read_rows(tensor, first, last, memoryview(buffer))
            if buffer.count(0) != len(buffer):
                return False
    return True


def _blocks(tensor: TensorInfo) -> Iterable[tuple[int, int]]:
    step = max(1, _COMPARED_BYTES // max(1, tensor.row_bytes))
    for first in range(0, tensor.n_rows, step):
        yield first, min(first + step, tensor.n_rows)
