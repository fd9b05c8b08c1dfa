"""Decide what becomes of biases, which only Hugging Face's Llama has.

TorchTitan's stock Llama and Meta's have none. Biases that are all zero are left out there. Others
are refused for a DCP, and written for Meta with a warning: its files have no list of tensors.

transformers reads biases of attention and of the feed-forward only if ``attention_bias`` and
``mlp_bias`` in config.json say so, and then expects them in every layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from llamaconv.checkpoint.checkpoint import Checkpoint, ModelConfig
from llamaconv.checkpoint.reader import all_zero
from llamaconv.checkpoint.tensors import TensorInfo
from llamaconv.model.families import FAMILIES, LLAMA
from llamaconv.model.names import ROLES
from llamaconv.model.params import LlamaParams
from llamaconv.plan.target import Target
from llamaconv.report.errors import Problem, first_few, warning

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
    found = {
        role: [tensor for (name, _), tensor in known.items() if name == role]
        for role in ROLES
        if ROLES[role].is_bias
    }
    found = {role: tensors for role, tensors in found.items() if tensors}
    if target.format == "huggingface":
        result.problems += _incomplete(found, params)
    else:
        _without_place(result, source, found, target, params)
    return result


def _without_place(
    result: Biases,
    source: Checkpoint,
    found: Mapping[str, list[TensorInfo]],
    target: Target,
    params: LlamaParams,
) -> None:
    """Leave out biases that are zero; report the others."""
    unread: list[str] = []
    not_zero: dict[str, list[str]] = {}
    for role, tensors in found.items():
        shape = ROLES[role].shape(params)
        away = [tensor.name for tensor in tensors if not tensor.is_here]
        # A bias of a wrong shape is reported as that.
        read = [tensor for tensor in tensors if tensor.is_here and tensor.shape == shape]
        if names := [tensor.name for tensor in read if not all_zero(tensor)]:
            not_zero[_of(role)] = sorted(names, key=lambda name: (len(name), name))
        if target.format == "meta" and (names or away):
            continue  # the format has a name for each, and all of a kind stay together
        unread += away
        for tensor in tensors:
            reason = "all zero, so nothing is lost"
            if tensor.name in away:
                reason = "headers do not show whether it is zero"
            elif tensor.name in names:
                reason = "not zero"
            result.left_out[tensor.name] = f"{target.naming} has no biases; {reason}"
    if not_zero:
        result.problems.append(_not_zero(source, not_zero, target))
    if unread:
        message = (
            f"{len(unread)} biases ({first_few(unread, 3)}): the target has none, and headers "
            "alone do not show whether these are zero. If one is not, the conversion will be "
            "refused: download the weights to find out"
        )
        result.problems.append(warning(message, unread))


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
        "TorchTitan's Llama has no biases, so the target would compute something else. Hugging "
        "Face's format keeps them: --to hf"
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
