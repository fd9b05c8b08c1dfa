"""Decide what becomes of each tensor of a Llama, in the order of a forward pass."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

from llamaconv.checkpoint.checkpoint import Checkpoint
from llamaconv.checkpoint.tensors import TensorInfo
from llamaconv.model.families import FAMILIES, Family
from llamaconv.model.names import (
    GENERATIONS,
    ROLES,
    Role,
    bare_name,
    every_role,
    identify,
    whole,
)
from llamaconv.model.params import LlamaParams
from llamaconv.plan.biases import resolve_biases
from llamaconv.plan.plan import Move, Operation
from llamaconv.plan.target import RULES, Target
from llamaconv.plan.tied_head import resolve_head
from llamaconv.report.errors import Problem, explained, first_few


def drop(
    tensor: TensorInfo, reason: str, role: Role | None = None, layer: int | None = None
) -> Move:
    """Return the move that leaves ``tensor`` out of the target."""
    return Move(tensor.name, None, "drop", tensor.dtype, tensor.shape, reason, None, role, layer)


class Mover:
    """The moves of the tensors that belong to a Llama.

    Attributes:
        params: The target's parameters; they differ from the source's in ``tied`` alone.
        moves: What becomes of each tensor.
        missing: Names of the tensors that a Llama of these parameters needs and the source lacks.
        problems: What was found on the way.
    """

    def __init__(
        self,
        source: Checkpoint,
        target: Target,
        params: LlamaParams,
        known: Mapping[tuple[str, int | None], TensorInfo],
        before: Iterable[Problem],
    ) -> None:
        """Decide all moves.

        Args:
            source: The checkpoint; the weights of biases and of a tied head may be read.
            target: What to create.
            params: The source's parameters.
            known: The source's tensors by role name and layer.
            before: The problems found before, which may explain missing tensors.
        """
        self._source, self._target = source, target
        self._head = head = resolve_head(known, params, target)
        self._naming = source.naming or "huggingface"
        self.params, self.problems = head.params, list(head.problems)
        self.moves: list[Move] = []
        self.missing: list[str] = []
        unplaced: dict[str, list[str]] = {}
        for role, layer in every_role(params):
            tensor = head.sources.get((role.name, layer))
            if role.name in head.left_out:
                continue
            if tensor is None:
                self.missing.append(whole(role.in_naming(self._naming, layer) or role.name))
            elif name := role.in_naming(target.naming, layer):
                self._move(role, layer, tensor, name, head.written.get(role.name))
            else:
                unplaced.setdefault(role.name, []).append(tensor.name)
        self.problems += self._no_such(unplaced)
        self.missing = list(dict.fromkeys(self.missing))  # one tensor may lack several roles
        self._report_missing(tuple(before))
        self._move_rest(known)

    def _no_such(self, unplaced: Mapping[str, list[str]]) -> Iterator[Problem]:
        """Yield an error if the target's naming lacks tensors that the family needs."""
        if not unplaced:
            return
        family = FAMILIES[self.params.family]
        names = tuple(name for its in unplaced.values() for name in its)
        ways = [
            f"--to {rules.to}" for rules in RULES.values() if self._has_all(rules.naming, family)
        ]
        ways += [f"--generation {one}" for one in GENERATIONS if self._has_all(one, family)]
        yield Problem(
            f"{self._source.path}: a {family.title} has {' and '.join(unplaced)} in every layer, and "
            f"{self._target} has no such tensors ({first_few(names, 2)}). Use {' or '.join(ways)}",
            names,
        )

    @staticmethod
    def _has_all(naming: str | None, family: Family) -> bool:
        return naming is not None and all(ROLES[role].names[naming] for role in family.roles)

    def _report_missing(self, before: tuple[Problem, ...]) -> None:
        accounted = {bare_name(name, self._naming) for name in explained(before)}
        lost = tuple(name for name in self.missing if name not in accounted)
        if not lost or any(problem.explains_missing for problem in before):
            return
        self.problems.append(
            Problem(
                f"{self._source.path}: {len(lost)} tensors that a {FAMILIES[self.params.family].title} of {self.params.n_layers} "
                f"layers needs are missing: {first_few(lost)}. {self._why_missing(lost)}",
                lost,
            )
        )

    def _why_missing(self, lost: Collection[str]) -> str:
        if set(lost) == {ROLES["output"].names[self._naming]}:
            return (
                "The parameters say that the head is not tied to the embedding, but only a tied "
                "head may be left out. If it is tied after all, use --tie embedding; if this was "
                "saved without a head (LlamaModel), no conversion can supply one"
            )
        layers = {known[1] for name in lost if (known := identify(name, self._naming))}
        n_found, n_lost = self.params.n_layers - len(layers), len(lost)
        names = (role.names[self._naming] for role, layer in every_role(self.params) if layer == 0)
        per_layer = {whole(name) for name in names if name}
        if None not in layers and n_lost == len(per_layer) * len(layers):
            return (
                f"The parameters say {self.params.n_layers} layers, and the weights have "
                f"{n_found}: the parameters are of another model, or files are missing"
            )
        return "No file has them: a file is missing, or they were not saved"

    def _move_rest(self, known: Mapping[tuple[str, int | None], TensorInfo]) -> None:
        """Decide about biases, and a head or embedding that the other one replaces."""
        used = {move.source for move in self.moves}
        biases = resolve_biases(self._source, self._target, self.params, known)
        self.problems += biases.problems
        for (name, layer), tensor in known.items():
            role = ROLES[name]
            if tensor.name in used:
                continue
            left_out = {**self._head.left_out, **self._head.replaced}.get(name)
            if reason := left_out or biases.left_out.get(tensor.name):
                self.moves.append(drop(tensor, reason, role, layer))
            elif target_name := role.in_naming(self._target.naming, layer):
                self._move(role, layer, tensor, target_name)

    def _move(
        self, role: Role, layer: int | None, tensor: TensorInfo, name: str, tie: str | None = None
    ) -> None:
        heads, dtype = role.n_heads(self.params), self._target.dtype
        if dtype == "keep":
            dtype = tensor.dtype
        cast = f"{tensor.dtype} to {dtype}" if dtype != tensor.dtype else ""
        if self._source.rope == self._target.layout:
            heads = None
        operation: Operation = "cast" if cast else "copy"
        reason = tie
        if tie:
            operation = "tie"
        elif heads:
            operation = "reorder"
            reason = f"{heads} heads, {self._source.rope} to {self._target.layout}"
        why = "; ".join(filter(None, (reason, cast))) or "same bytes"
        shape = tensor.shape
        self.moves.append(Move(tensor.name, name, operation, dtype, shape, why, heads, role, layer))
