"""Decide what becomes of biases.

A family may need biases, as Qwen 2 does those of q, k and v; they are moved as any tensor. Those that
a flag of config.json switches on (`Family.flags`) are decided here. transformers then expects all of a
flag, in every layer, so they stay together.

Where a target names them they are written, unless all of a flag are zero: a model without biases is
the same, and TorchTitan's stock flavours have none. Where it does not, biases that are not zero are
refused. Meta's files have names for them, and its code none: they are written with a warning.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from llamaconv.checkpoint.checkpoint import Checkpoint, ModelConfig
from llamaconv.checkpoint.reader import not_zero
from llamaconv.checkpoint.tensors import TensorInfo
from llamaconv.model.families import FAMILIES, LLAMA
from llamaconv.model.names import ROLES
from llamaconv.model.params import LlamaParams
from llamaconv.plan.target import Target
from llamaconv.report.errors import FailedError, Problem, first_few, warning

Known = Mapping[tuple[str, int | None], TensorInfo]
"""Tensors by role name and layer."""


@dataclass
class Biases:
    """What becomes of the biases of a source.

    Attributes:
        left_out: Why a bias is dropped, by the tensor's name.
        problems: Biases that the target cannot hold, and flags that say something else.
    """

    left_out: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def resolve_biases(source: Checkpoint, target: Target, params: LlamaParams, known: Known) -> Biases:
    """Decide by the values of the biases and the format of ``target``."""
    result = Biases()
    family = FAMILIES[params.family]
    found = {
        role: [tensor for (name, _), tensor in known.items() if name == role]
        for role in ROLES
        if ROLES[role].is_bias
    }
    found = {role: tensors for role, tensors in found.items() if tensors}
    if target.format == "huggingface":
        result.problems += _incomplete(found, params)
    elif target.format == "meta":
        _without_place(result, source, found, target, params)
    else:
        unnamed: dict[str, list[TensorInfo]] = {}
        for roles in family.flags.values():
            its = {role: found[role] for role in roles if role in found}
            if all(ROLES[role].names[target.naming] for role in roles):
                _together(result, source, roles, its, params)
            else:
                unnamed |= its
        _without_place(result, source, unnamed, target, params)
    return result


def _together(
    result: Biases,
    source: Checkpoint,
    roles: tuple[str, ...],
    found: Mapping[str, list[TensorInfo]],
    params: LlamaParams,
) -> None:
    """Leave the biases of one flag out if all are zero; otherwise the target needs every one."""
    tensors = [one for its in found.values() for one in its]
    names = tuple(one.name for one in tensors)
    # A bias of a wrong shape is reported as that.
    are_right = all(
        one.shape == ROLES[role].shape(params) for role, its in found.items() for one in its
    )
    try:
        are_zero = are_right and next(not_zero(tensors), None) is None
    except FailedError as error:
        result.problems += error.problems
        return
    if are_zero:
        reason = "zero, as all of its kind; the target needs none"
        result.left_out |= dict.fromkeys(names, reason)
        return
    lacking = [_of(role) for role in roles if len(found.get(role, ())) < params.n_layers]
    if lacking:
        result.problems.append(
            Problem(
                f"{source.path}: has {len(names)} biases ({first_few(names, 2)}), and {', '.join(lacking)} "
                "lack some. transformers sets those to zero; TorchTitan does not start without them. "
                "Load the model with transformers and save it: that writes all",
                names,
            )
        )


def _without_place(
    result: Biases,
    source: Checkpoint,
    found: Mapping[str, list[TensorInfo]],
    target: Target,
    params: LlamaParams,
) -> None:
    """Leave out biases that are zero; report the others."""
    others: dict[str, list[str]] = {}
    for role, tensors in found.items():
        shape = ROLES[role].shape(params)
        # A bias of a wrong shape is reported as that.
        read = [tensor for tensor in tensors if tensor.shape == shape]
        try:
            names = list(not_zero(read))
        except FailedError as error:
            result.problems += error.problems
            return
        if names:
            others[_of(role)] = sorted(names, key=lambda name: (len(name), name))
        if target.format == "meta" and names:
            continue  # the format has a name for each, and all of a kind stay together
        for tensor in tensors:
            reason = "all zero, so nothing is lost"
            if tensor.name in names:
                reason = "not zero"
            result.left_out[tensor.name] = f"{target.naming} has no biases; {reason}"
    if others:
        result.problems.append(_not_zero(source, others, target))


_WAYS = "--generation titan-0.3 and --to hf keep them"


def _not_zero(source: Checkpoint, found: Mapping[str, list[str]], target: Target) -> Problem:
    names = tuple(name for its in found.values() for name in its)
    shown = ", ".join(
        f"{len(its)} of {matrix} like {its[0]}" if len(its) > 1 else its[0]
        for matrix, its in found.items()
    )
    message = f"{source.path}: {len(names)} biases are not zero ({shown}). "
    if target.format == "meta":
        message += (
            "They are written, but Meta's Llama has no biases: its code ignores or refuses them. "
            "Converted back to Hugging Face, they are used again"
        )
        return warning(message, names)
    message += (
        f"{target.naming} has no names for them, so the target would compute something else. "
        f"{_WAYS}"
    )
    return Problem(message, names)


def _of(role: str) -> str:
    """Return the name of the matrix that a bias belongs to, as transformers has it."""
    return str(ROLES[role].names["huggingface"]).split(".")[-2]


def _incomplete(found: Mapping[str, list[TensorInfo]], params: LlamaParams) -> Iterator[Problem]:
    """Yield a warning if a model has some of the biases that one flag stands for."""
    for flag, roles in FAMILIES[params.family].flags.items():
        expected = len(roles) * params.n_layers
        stored = sum(len(found.get(role, ())) for role in roles)
        if 0 < stored < expected:
            lacking = [_of(role) for role in roles if len(found.get(role, ())) < params.n_layers]
            yield warning(
                f"{flag} stands for {expected} biases and the source stores {stored} "
                f"({', '.join(lacking)} lack some); transformers sets the others to zero"
            )


def check_flags(
    config: ModelConfig, known: Known, target: Target, params: LlamaParams | None
) -> Iterator[Problem]:
    """Yield a warning for each flag of config.json that the tensors do not bear out."""
    family = FAMILIES[params.family] if params else LLAMA
    for flag, roles in family.flags.items():
        names = [tensor.name for (role, _), tensor in known.items() if role in roles]
        stated = config.entries.get(flag, False)
        if stated is True and not names:
            yield warning(
                f"{config.path}: {flag} is true, but no such bias is stored; taken as false"
            )
        elif names and stated is not True and target.format != "dcp":
            yield warning(
                f"{config.path}: {flag} is not true, so transformers ignores the "
                f"{len(names)} biases that are stored ({first_few(names, 3)}); taken as true",
                names,
            )
