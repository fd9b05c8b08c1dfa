"""Making a plan: every source tensor sorted into one class, every problem found.

Works on headers alone, without torch; weights are read only where a decision hangs on them
(biases that a target has no place for, and in `head` a tied head that is also stored).
"""

from __future__ import annotations

from collections.abc import Iterable

from llamaconv import keys
from llamaconv.assets import with_params
from llamaconv.compare import all_one, all_zero
from llamaconv.foreign import family_of
from llamaconv.head import resolve_head
from llamaconv.opened import Checkpoint
from llamaconv.params import LlamaParams
from llamaconv.params_json import unfit
from llamaconv.pieces import WEIGHT_DTYPES, TensorInfo
from llamaconv.plan import Move, Operation, Plan, Target
from llamaconv.problems import Problem, some, warning


def make_plan(source: Checkpoint, target: Target | None = None) -> Plan:
    """The plan from an opened checkpoint to a target. Never raises for a bad checkpoint."""
    target = (target or Target()).resolve(source)
    return _Planner(with_params(source, target), target).plan()


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
        self._sort_tensors()
        if self.params is not None:
            self._move_all(self.params)
            self._check_tensors(self.params)
            if self.target.to == "meta":
                self._check_meta(self.params)
            self._check_trained()
        if self._nothing_to_do():
            self.error(
                f"{self.source.path}: is {self.target}, {self.source.rope} rows already; there is "
                "nothing to convert. Choose another --to, --generation, --rope, --dtype or --shards"
            )
        if self.target.to == "dcp" and self.target.rope != "interleaved":
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

    def _nothing_to_do(self) -> bool:
        return (
            self.source.format == self.target.to == "dcp"
            and self.target.shards == 1
            and bool(self.moves)
            and all(move.operation == "copy" and move.source == move.target for move in self.moves)
        )

    # Sorting: every name is a role's, dropped on purpose, or unknown.

    def _sort_tensors(self) -> None:
        schemes: dict[str, list[str]] = {}
        for name, tensor in self.source.tensors.items():
            known = keys.identify(name, self.source.naming)
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
        beyond = [name for name in unknown if keys.identify(name, self.source.naming)]
        if beyond and self.params:
            return (
                f". The parameters say {self.params.n_layers} layers and these are of later ones: "
                "they and the weights are of different models"
            )
        if self.source.format == "huggingface" and all(
            keys.identify(f"model.{name}", "huggingface") for name in unknown
        ):
            return ". They lack 'model.' in front: saved from LlamaModel, not LlamaForCausalLM"
        if family := family_of(unknown):
            return f". Such are of {family}"
        return ". They are of another model family, or of an extension that has to be merged first"

    def _drop(
        self,
        tensor: TensorInfo,
        reason: str,
        role: keys.Role | None = None,
        layer: int | None = None,
    ) -> None:
        self.moves.append(
            Move(
                source=tensor.name,
                target=None,
                operation="drop",
                dtype=tensor.dtype,
                shape=tensor.shape,
                reason=reason,
                role=role,
                layer=layer,
            )
        )

    # Moving: every role that a complete Llama has, in the order of a forward pass.

    def _move_all(self, params: LlamaParams) -> None:
        head = resolve_head(self.known, params, self.target)
        self.params = head.params
        self.problems += head.problems
        for role, layer in keys.every(params):
            tensor = head.sources.get((role.name, layer))
            target = role.in_naming(self.target.naming, layer)
            if role.name in head.left_out:
                continue
            if tensor is None:
                self.missing.append(
                    role.in_naming(self.source.naming or "huggingface", layer) or role.name
                )
            elif target is not None:
                heads = role.n_heads(params)
                self._move(role, layer, tensor, target, heads, head.written.get(role.name))
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
            if tensor.name in used:
                continue
            if reason := head.left_out.get(name) or head.replaced.get(name):
                self._drop(tensor, reason, keys.ROLES[name], layer)
            else:
                self._bias(keys.ROLES[name], layer, tensor, params)

    def _cause_of_missing(self) -> str:
        if self.missing == [keys.ROLES["output"].names[self.source.naming or "huggingface"]]:
            return (
                "The parameters say that the head is not tied, so it is not the embedding: the "
                "download is incomplete; if the model is tied after all, say so with --tie embedding"
            )
        return "The download is incomplete, or config.json is of another model"

    def _move(
        self,
        role: keys.Role,
        layer: int | None,
        tensor: TensorInfo,
        target: str,
        heads: int | None,
        tie: str | None,
    ) -> None:
        dtype = tensor.dtype if self.target.dtype == "keep" else self.target.dtype
        cast = f"{tensor.dtype} to {dtype}" if dtype != tensor.dtype else ""
        reorder = heads is not None and self.source.rope != self.target.layout
        operation: Operation
        if tie:
            operation, reason = "tie", tie + (f"; {cast}" if cast else "")
        elif reorder:
            operation = "reorder"
            reason = f"{heads} heads, {self.source.rope} to {self.target.layout}"
            reason += f"; {cast}" if cast else ""
        elif cast:
            operation, reason = "cast", cast
        else:
            operation, reason = "copy", "same bytes"
        self.moves.append(
            Move(
                source=tensor.name,
                target=target,
                operation=operation,
                dtype=dtype,
                shape=tensor.shape,
                reason=reason,
                heads=heads if reorder else None,
                role=role,
                layer=layer,
            )
        )

    def _bias(
        self, role: keys.Role, layer: int | None, tensor: TensorInfo, params: LlamaParams
    ) -> None:
        target = role.in_naming(self.target.naming, layer)
        if target is not None:
            self._move(role, layer, tensor, target, role.n_heads(params), None)
            return
        reason = f"{self.target.generation} has no biases; all zero, so nothing is lost"
        self._drop(tensor, reason, role, layer)
        if tensor.shape == role.shape(params) and not all_zero(tensor):
            self.error(
                f"{tensor.name}: a bias that is not zero; TorchTitan's Llama has no biases, so the "
                "target would compute something else",
                (tensor.name,),
            )

    def _check_meta(self, params: LlamaParams) -> None:
        self.problems += unfit(params)
        for count in ("n_heads", "n_kv_heads", "ffn_dim", "vocab_size"):
            if getattr(params, count) % self.target.shards:
                self.error(
                    f"--shards {self.target.shards}: {count} {getattr(params, count)} cannot be cut "
                    "into that many equal parts, as Meta's files need"
                )

    def _check_trained(self) -> None:
        """Norms start as ones; a trainer that never loaded weights saves them so."""
        norms = [t for (name, _), t in self.known.items() if name.endswith("norm")]
        if self.source.format == "dcp" and norms and all(map(all_one, norms)):
            self.problems.append(
                warning(
                    f"{self.source.path}: looks like a random initialisation: all {len(norms)} norms "
                    "are exactly 1, as before any training. Were the weights ever loaded?"
                )
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
        cause = "config.json and the weights are of different models"
        if self.source.format == "meta":
            cause = (
                "params.json and the weights are of different models, or the last files are missing"
            )
        for (name, shape), names in wrong.items():
            role = keys.ROLES[name]
            formula = ", ".join(f"{axis} = {getattr(params, axis)}" for axis in role.axes)
            self.error(
                f"{some(names, 3)}: shape {list(shape)}, {list(role.shape(params))} expected "
                f"({formula}, {params.n_heads} heads and {params.n_kv_heads} kv heads of "
                f"{params.head_dim}). {cause}",
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
