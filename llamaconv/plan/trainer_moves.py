"""Decide what becomes of a training run's optimizer and of the rest of its trainer's state.

A moment of a parameter is moved as its weight is: the same role, the same reordering, fused and split
with it, in its own dtype. Where roles become one parameter, what is kept once per parameter (its step,
its entries of the parameter groups) must be the same for all of them. What is not a tensor is copied as
it lies, and compared by its bytes.

Limit: optimizers whose tensors have the shape of the parameter, or no dimensions (a step).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from llamaconv.checkpoint.checkpoint import Checkpoint
from llamaconv.checkpoint.fused import fused_role
from llamaconv.checkpoint.reader import same_bytes
from llamaconv.checkpoint.tensors import TensorInfo
from llamaconv.checkpoint.trainer_state import (
    MadeValue,
    StoredValue,
    TrainerState,
    parameter_of,
    read_trainer_state,
    split_state,
)
from llamaconv.model.names import (
    FUSED_IN_OPTIMIZER,
    OPTIMIZER,
    ROLES,
    Role,
    every_role,
    identify,
    state_name,
    trainer_state,
    whole,
)
from llamaconv.model.params import LlamaParams
from llamaconv.plan.plan import Move, Operation, ValueCopy
from llamaconv.plan.target import Target
from llamaconv.report.errors import Problem, first_few, warning

_STATE, _GROUPS = f"{OPTIMIZER}.state.", f"{OPTIMIZER}.param_groups."
_SCHEDULER = "lr_scheduler."
# 0.2.x has one group and saves all of its scheduler, later releases the number of steps alone; and its
# data loader keeps its position in another form.
_OLD = "titan-0.2"
# What every optimizer of TorchTitan (Adam and AdamW) keeps of a parameter.
_NEEDED = ("exp_avg", "exp_avg_sq", "step")
# What a trainer of TorchTitan loads besides.
_KEYS = ("lr_scheduler", "train_state", "dataloader")

Place = tuple[str, int | None]
"""Role name and layer."""


@dataclass
class TrainerMoves:
    """What becomes of a trainer's state.

    Attributes:
        source: The source with the optimizer's tensors; None if there is nothing to move.
        moves: What becomes of the optimizer's tensors.
        values: The copies of all other entries.
        problems: Errors, which refuse the conversion, and warnings.
    """

    source: Checkpoint | None = None
    moves: list[Move] = field(default_factory=list)
    values: list[ValueCopy] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


@dataclass
class Parameter:
    """A parameter as the source's optimizer has it.

    Attributes:
        name: Its name there.
        role: Its role, which may hold several.
        tensors: Its tensors, by ``exp_avg``, ``step`` and so on.
        values: Its other entries, by what stands before and after its name.
    """

    name: str
    role: Role
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    values: dict[tuple[str, str], StoredValue] = field(default_factory=dict)


def plan_trainer_state(
    source: Checkpoint, target: Target, params: LlamaParams | None
) -> TrainerMoves:
    """Plan the optimizer's tensors and the other entries of the trainer's state.

    Args:
        source: The checkpoint.
        target: What to create, with ``with_optimizer``.
        params: The target's parameters.
    """
    if reason := _why_not(source, target):
        return TrainerMoves(problems=[Problem(reason)])
    assert params is not None
    state = read_trainer_state(source.local_path)
    if state.problems:
        return TrainerMoves(problems=list(state.problems))
    found = _Parameters(source, params, state)
    result = TrainerMoves(problems=found.problems)
    if found.problems:
        return result
    _move(source, target, params, found, result)
    for name, value in state.values.items():
        if not name.startswith((_STATE, _GROUPS)):
            result.values.append(ValueCopy(value, name))
    if target.naming == _OLD != source.naming:
        _for_0_2(source, found, result)
    result.problems += _left_out(source, target, state)
    return result


def _for_0_2(source: Checkpoint, found: _Parameters, result: TrainerMoves) -> None:
    """Add what 0.2.x loads and later releases do not save; refuse groups that it does not have."""
    first, *others = found.parameters
    apart = {
        what: one.name
        for (start, what), value in first.values.items()
        for one in others
        if start == _GROUPS and not _is_same(value, one.values[start, what])
    }
    if apart:
        what, name = next(iter(apart.items()))
        result.problems.append(
            Problem(
                f"{source.path}: its parameter groups differ in {', '.join(apart)} ({what} of "
                f"{first.name} and of {name}), and 0.2.x has one group for all parameters. Choose "
                "another generation, or leave --with-optimizer out",
                (first.name, name),
            )
        )
        return
    state = found.state.values
    last_epoch, base_lr = (
        state.get(f"{_SCHEDULER}last_epoch"),
        first.values.get((_GROUPS, "initial_lr")),
    )
    lr = first.values.get((_GROUPS, "lr"))
    if f"{_SCHEDULER}base_lrs" in state or not (last_epoch and base_lr and lr):
        return
    try:
        made = {
            "_step_count": (last_epoch, last_epoch.number() + 1),
            "_is_initial": (last_epoch, False),
            "_get_lr_called_within_step": (last_epoch, False),
            "base_lrs": (base_lr, [base_lr.number()]),
            "_last_lr": (lr, [lr.number()]),
        }
    except (OSError, ValueError) as error:
        result.problems.append(
            Problem(f"{source.path}: the scheduler's state for 0.2.x cannot be made: {error}")
        )
        return
    result.values += [
        ValueCopy(MadeValue(value.name, plain), f"{_SCHEDULER}{name}")
        for name, (value, plain) in made.items()
    ]


def _why_not(source: Checkpoint, target: Target) -> str:
    """Return why a trainer's state cannot be carried at all; "" if it can."""
    option = "--with-optimizer"
    if source.format == "torch_checkpointing":
        return (
            f"{option}: of {source.path} the model alone is read; the trainer's state of "
            "torch_checkpointing is not carried. Leave the option out"
        )
    if source.format != "dcp":
        return (
            f"{option}: {source.path} is no DCP, and the state of a trainer is carried from a DCP of "
            "TorchTitan alone. Leave the option out"
        )
    if target.format != "dcp":
        return (
            f"{option}: {target} has no place for an optimizer. Choose --to dcp, or leave the option "
            "out to convert the model alone"
        )
    if target.naming not in FUSED_IN_OPTIMIZER:
        return (
            f"{option}: {target.naming} is the form of a script that wrote models alone, and no release "
            f"loads an optimizer from it. Choose --generation {', '.join(FUSED_IN_OPTIMIZER)}"
        )
    if source.naming not in FUSED_IN_OPTIMIZER:
        return (
            f"{option}: the names in {source.path} are those of {source.naming}, and only TorchTitan's "
            f"({', '.join(FUSED_IN_OPTIMIZER)}) are known with their optimizer. Leave the option out"
        )
    known = ((name, identify(name, source.naming)) for name in source.tensors)
    if biases := [name for name, found in known if found and found[0].is_bias]:
        return (
            f"{option}: the model has biases ({first_few(biases, 2)}), and the optimizer of 0.3.0 keeps "
            "those of q, k and v as one, which cannot be moved yet. Leave the option out"
        )
    if target.tie in ("embedding", "head"):
        return (
            f"{option}: --tie {target.tie} makes one parameter of two that were trained apart, and their "
            "moments cannot be made one. Leave one of the two options out"
        )
    return ""


class _Parameters:
    """The parameters of the source's optimizer, checked against the model.

    Attributes:
        of: The parameter that holds each role.
        states: The optimizer's tensors of the parameter's own shape, such as ``exp_avg``.
        scalars: Those without dimensions, such as ``step``.
        problems: An error for each cause.
        parameters: All of them.
        state: All entries of the trainer.
    """

    def __init__(self, source: Checkpoint, params: LlamaParams, state: TrainerState) -> None:
        self.source, self.params, self.state = source, params, state
        self.of: dict[Place, Parameter] = {}
        self.problems: list[Problem] = []
        self._by_name: dict[str, Parameter] = {}
        self.parameters = self._by_name.values()
        unknown = []
        for name, tensor in state.tensors.items():
            if (known := parameter_of(name, source.naming)) and self._is_here(known[1]):
                role, layer, parameter, what = known
                self._parameter(role, layer, parameter).tensors[what] = tensor
            elif name.startswith(f"{OPTIMIZER}."):
                unknown.append(name)
        for name, value in state.values.items():
            start = next((one for one in (_STATE, _GROUPS) if name.startswith(one)), "")
            parameter, _, what = name.removeprefix(start).rpartition(".")
            place = identify(parameter, source.naming) or fused_role(parameter)
            if start and place and self._is_here(place[1]):
                self._parameter(*place, parameter).values[start, what] = value
            elif name.startswith(f"{OPTIMIZER}."):
                unknown.append(name)
        every = [one for found in self._by_name.values() for one in found.tensors]
        self.scalars = [
            what
            for what in dict.fromkeys(every)
            if all(one.tensors[what].shape == () for one in self._having(what))
        ]
        self.states = [what for what in dict.fromkeys(every) if what not in self.scalars]
        if not self.problems:
            self.problems += self._check(unknown)

    def _is_here(self, layer: int | None) -> bool:
        return (layer or 0) < self.params.n_layers

    def _having(self, what: str) -> Iterator[Parameter]:
        return (one for one in self._by_name.values() if what in one.tensors)

    def _parameter(self, role: Role, layer: int | None, name: str) -> Parameter:
        found = self._by_name.setdefault(name, Parameter(name, role))
        for part in role.parts or (role.name,):
            other = self.of.setdefault((part, layer), found)
            if other is not found and not any(name in one.names for one in self.problems):
                self.problems.append(
                    Problem(
                        f"{self.source.path}: its optimizer has {part} twice, as {other.name} and as "
                        f"{name}: two runs have saved to this folder",
                        (name, other.name),
                    )
                )
        return found

    def _check(self, unknown: Sequence[str]) -> Iterator[Problem]:
        path = self.source.path
        if not self._by_name:
            yield Problem(
                f"{path}: holds no state of an optimizer that belongs to this model"
                + (f" (but {first_few(unknown, 3)})" if unknown else "")
                + ". It was saved model-only, or by another trainer; leave --with-optimizer out"
            )
            return
        if unknown:
            yield Problem(
                f"{path}: {len(unknown)} entries of the optimizer belong to no tensor of the model: "
                f"{first_few(unknown, 3)}. They are of another model, or of an optimizer that "
                "TorchTitan does not have; without --with-optimizer the model alone is converted",
                tuple(unknown),
            )
        # A model with biases has been refused.
        if biases := [one.name for (role, _), one in self.of.items() if role.endswith(".bias")]:
            yield Problem(
                f"{path}: the optimizer has state of {len(biases)} biases ({first_few(biases, 2)}), and "
                "the model has none: it is of another model",
                tuple(biases),
            )
            return
        lacking = [
            str(role.in_naming(self.source.naming or "", layer))
            for role, layer in every_role(self.params)
            if (role.name, layer) not in self.of
            and not (role.name == "output" and self.params.tied)
        ]
        if lacking:
            lost = list(dict.fromkeys(map(whole, lacking)))
            yield Problem(
                f"{path}: the optimizer has no state of {len(lost)} tensors of the model: "
                f"{first_few(lost, 3)}. {self._why_lacking(lost)}",
                tuple(lost),
            )
        yield from self._incomplete()
        yield from self._wrong_shapes()

    def _why_lacking(self, lost: Sequence[str]) -> str:
        if all(name.endswith(("output.weight", "lm_head.weight")) for name in lost):
            return (
                "The run tied the head to the embedding, and trained one parameter; a target that does "
                "not tie them needs the state of two. Leave --with-optimizer out"
            )
        return "The save is incomplete, or these were frozen; leave --with-optimizer out"

    def _incomplete(self) -> Iterator[Problem]:
        """Yield an error if parameters do not all have the same entries."""
        wanted: dict[tuple[str, str], list[str]] = {}
        for one in self._by_name.values():
            for what in one.tensors:
                wanted.setdefault((_STATE, what), []).append(one.name)
            for key in one.values:
                wanted.setdefault(key, []).append(one.name)
        for what in _NEEDED:
            wanted.setdefault((_STATE, what), [])
        for (start, what), having in wanted.items():
            if lacking := [name for name in self._by_name if name not in set(having)]:
                names = tuple(f"{start}{name}.{what}" for name in lacking)
                yield Problem(
                    f"{self.source.path}: {len(lacking)} of {len(self._by_name)} parameters of the "
                    f"optimizer have no {what}: {first_few(names, 3)}. The save is incomplete, or it is "
                    "another optimizer than Adam; leave --with-optimizer out",
                    names,
                )

    def _wrong_shapes(self) -> Iterator[Problem]:
        wrong = [
            (tensor, one.role.shape(self.params))
            for one in self._by_name.values()
            for what, tensor in one.tensors.items()
            if what not in self.scalars and tensor.shape != one.role.shape(self.params)
        ]
        if wrong:
            tensor, expected = wrong[0]
            yield Problem(
                f"{self.source.path}: {len(wrong)} tensors of the optimizer have other shapes than "
                f"their weights, such as {tensor.name}: expected {list(expected)}, found "
                f"{list(tensor.shape)}. The optimizer is of another model",
                tuple(tensor.name for tensor, _ in wrong),
            )


def _move(
    source: Checkpoint,
    target: Target,
    params: LlamaParams,
    found: _Parameters,
    result: TrainerMoves,
) -> None:
    """Add the moves and copies of each parameter of the target."""
    parameters: dict[str, list[tuple[Role, int | None, str]]] = {}
    for role, layer in every_role(params):
        if (role.name, layer) not in found.of:
            continue  # a tied head; all else that lacks has been reported
        name = role.in_optimizer(target.naming, layer)
        assert name is not None
        parameters.setdefault(whole(name), []).append((role, layer, name))
    tensors: dict[str, TensorInfo] = {}
    apart: dict[str, list[str]] = {}
    for fused, parts in parameters.items():
        # The parameters of the source that become this one, each once.
        held = {
            found.of[role.name, layer].name: found.of[role.name, layer] for role, layer, _ in parts
        }
        first, *others = held.values()
        for what in found.states:
            made = [_moment(source, target, params, found, part, what, tensors) for part in parts]
            result.moves += made
            dtypes = {move.dtype for move in made}
            if len(dtypes) > 1:
                apart.setdefault(f"dtypes of {what} ({', '.join(sorted(dtypes))})", []).append(
                    fused
                )
        for what in found.scalars:
            tensor = first.tensors[what]
            tensors[tensor.name] = tensor
            if not all(same_bytes(tensor, other.tensors[what]) for other in others):
                apart.setdefault(what, []).append(fused)
            role, layer, _ = parts[0]
            reason = (
                f"the same in {', '.join(one.name for one in others)}" if others else "same bytes"
            )
            result.moves.append(
                Move(
                    tensor.name,
                    state_name(fused, what),
                    "copy",
                    tensor.dtype,
                    tensor.shape,
                    reason,
                    role=role,
                    layer=layer,
                    state=what,
                )
            )
        for (start, what), value in first.values.items():
            if others and not all(_is_same(value, one.values[start, what]) for one in others):
                apart.setdefault(what, []).append(fused)
            result.values.append(ValueCopy(value, f"{start}{fused}.{what}"))
    if apart:
        result.problems.append(_cannot_join(source, target, parameters, apart))
    if (ROLES["output"].name, None) not in found.of and target.naming == _OLD:
        result.problems.append(
            Problem(
                f"{source.path}: the run tied the head to the embedding and trained one parameter, and "
                "titan-0.2 does not tie them: its optimizer needs the state of output.weight too. Leave "
                "--with-optimizer out",
                ("output.weight",),
            )
        )
    carried = {OPTIMIZER, *_keys(found.state)}
    ignored = tuple(one for one in source.ignored if one.name not in carried)
    merged = replace(source, tensors={**source.tensors, **tensors}, ignored=ignored)
    result.source = replace(merged, seen={**merged.remembered().seen, **source.seen})


def _moment(
    source: Checkpoint,
    target: Target,
    params: LlamaParams,
    found: _Parameters,
    part: tuple[Role, int | None, str],
    what: str,
    tensors: dict[str, TensorInfo],
) -> Move:
    """Return the move of one state of one role; add the tensor that it reads to ``tensors``."""
    role, layer, name = part
    held = found.of[role.name, layer]
    tensor = held.tensors[what]
    if held.role.parts:
        if (one := f"{tensor.name}[{role.name}]") not in tensors:
            tensors |= {part.name: part for part in split_state(tensor, held.role, params)}
        tensor = tensors[one]
    tensors[tensor.name] = tensor
    heads = role.n_heads(params) if source.rope != target.layout else None
    operation: Operation = "reorder" if heads else "copy"
    reason = f"{heads} heads, as its weight" if heads else "same bytes, as its weight"
    return Move(
        tensor.name,
        state_name(name, what),
        operation,
        tensor.dtype,
        tensor.shape,
        reason,
        heads,
        role,
        layer,
        what,
    )


def _cannot_join(
    source: Checkpoint,
    target: Target,
    parameters: Mapping[str, Sequence[tuple[Role, int | None, str]]],
    apart: Mapping[str, Sequence[str]],
) -> Problem:
    """Return the error that roles which become one parameter differ in what it has once."""
    fused = list(dict.fromkeys(name for names in apart.values() for name in names))
    roles = " and ".join(role.name for role, *_ in parameters[fused[0]])
    return Problem(
        f"{source.path}: its optimizer tells {roles} apart by {first_few(list(apart), 4)}, and in "
        f"{target.naming} they are one parameter: {first_few(fused, 2)}"
        f"{f' ({len(fused)} in all)' if len(fused) > 2 else ''}. Choose a generation that keeps them "
        "apart, or leave --with-optimizer out",
        tuple(fused),
    )


def not_loaded(source: Checkpoint, target: Target, keys: Collection[str]) -> dict[str, str]:
    """Return what TorchTitan cannot load of a trainer's state, by key with the reason.

    Args:
        source: The run.
        target: What it is converted to.
        keys: The keys that the run has.
    """
    lacking = dict.fromkeys((key for key in _KEYS if key not in keys), "the source has none")
    if source.naming != target.naming and _OLD in (source.naming, target.naming):
        reason = "0.2.x and later releases keep its position in other forms: the data begins anew"
        lacking.setdefault("dataloader", reason)
    return lacking


def _left_out(source: Checkpoint, target: Target, state: TrainerState) -> Iterator[Problem]:
    """Yield warnings about tensors that are not the optimizer's, and what will not be loaded."""
    others = [name for name in state.tensors if not name.startswith(f"{OPTIMIZER}.")]
    if others:
        keys = dict.fromkeys(map(trainer_state, others))
        yield warning(
            f"{source.path}: --with-optimizer carries no tensors but the optimizer's; left out are "
            f"{len(others)} under {', '.join(keys)}"
        )
    if lacking := not_loaded(source, target, _keys(state)):
        why = "; ".join(f"{key}: {reason}" for key, reason in lacking.items())
        yield warning(
            f"{source.path}: the run goes on without a part of its state, {why}. TorchTitan needs "
            f"--checkpoint.exclude_from_loading {','.join(lacking)} when it resumes from the target"
        )


def _is_same(one: StoredValue, other: StoredValue) -> bool:
    return one.length == other.length and one.digest() == other.digest()


def _keys(state: TrainerState) -> set[str]:
    """Return the keys under which a trainer has values."""
    return {name.split(".", maxsplit=1)[0] for name in state.values}
