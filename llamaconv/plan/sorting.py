"""Sort every source tensor into one class: of a Llama, dropped on purpose, or unknown.

A cause that explains several odd tensors is one problem: quantised weights with all their tables,
placeholders without values, the head of another task.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from llamaconv.checkpoint.checkpoint import Checkpoint
from llamaconv.checkpoint.fused import fused_role
from llamaconv.checkpoint.other_families import (
    OTHER_HEADS,
    Other,
    other_of,
    quantised_module,
    scheme_of,
)
from llamaconv.checkpoint.tensors import TensorInfo
from llamaconv.model.families import FAMILIES, family_named
from llamaconv.model.names import ROLES, Role, bare_name, identify, why_needless
from llamaconv.model.params import LlamaParams
from llamaconv.report.errors import Problem, explained, first_few

# A Llama's names have up to 6 parts, and wrappers of trainers may add some.
_MOST_PARTS = 16


@dataclass
class SortedTensors:
    """The tensors of a source, each in one class.

    Attributes:
        known: Tensors of a Llama, by role name and layer (None outside the layers).
        needless: Tensors that no target stores, such as RoPE's angles, each with the reason.
        unknown: Names of all others.
        problems: An error for each group of odd tensors that have one cause.
        is_quantised: Whether one of them says how the weights are quantised.
    """

    known: dict[tuple[str, int | None], TensorInfo] = field(default_factory=dict)
    needless: list[tuple[TensorInfo, str]] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    is_quantised: bool = False

    @property
    def is_another_model(self) -> bool:
        """Whether a problem says which other model the tensors are of."""
        return any(problem.explains_missing for problem in self.problems)


def sort_tensors(source: Checkpoint) -> SortedTensors:
    """Return the tensors of ``source`` by class."""
    found = SortedTensors()
    for name, tensor in source.tensors.items():
        known = identify(name, source.naming) or fused_role(name)
        if reason := why_needless(name):
            found.needless.append((tensor, reason))
        elif known and _is_of(source.params, *known):
            found.known[known[0].name, known[1]] = tensor
        else:
            found.unknown.append(name)
    found.problems += _causes(source, found)
    return found


def _is_of(params: LlamaParams | None, role: Role, layer: int | None) -> bool:
    """Return whether a model of these parameters, if they are known, has such a tensor."""
    if params is None:
        return True
    has = not role.optional or role.name in FAMILIES[params.family].extra
    return has and (layer or 0) < params.n_layers


def _causes(source: Checkpoint, found: SortedTensors) -> Iterator[Problem]:
    accounted = explained(source.problems)
    rest = [name for name in found.unknown if name not in accounted]
    if companions := {name: module for name in rest if (module := quantised_module(name))}:
        found.is_quantised = True
        modules = dict.fromkeys(companions.values())
        # Other tables of the same modules, whose names alone tell nothing, such as HQQ's zero.
        others = [
            name for name in rest if name.rpartition(".")[0] in modules and name not in companions
        ]
        yield _quantised(source, [*companions, *others], [f"{one}.weight" for one in modules])
        rest = [name for name in rest if name not in {*companions, *others}]
    for row in OTHER_HEADS:
        if heads := row.names(rest):
            yield _other_head(source, heads, row.what)
            rest = [name for name in rest if name not in set(heads)]
    if empty := [tensor for tensor in found.known.values() if 0 in tensor.shape]:
        yield _placeholders(source, empty, found.known)
    stated = source.config.entries.get("model_type") if source.config else None
    if rest and (stated is None or family_named(stated)):  # or config.json has been refused for it
        yield _unknown(source, rest)


def _quantised(source: Checkpoint, companions: list[str], weights: list[str]) -> Problem:
    """Return the error for quantised weights; it names their tables and the weights themselves."""
    scheme = scheme_of(companions)
    return Problem(
        f"{source.path}: {len(weights)} weights are quantised, scheme {scheme.what}: "
        f"{first_few(weights, 3)}; {len(companions)} tensors hold their scales and tables "
        f"({first_few(companions, 2)}). {scheme.remedy}",
        (*companions, *weights),
    )


def _other_head(source: Checkpoint, heads: list[str], kind: str) -> Problem:
    names = list(heads)
    output = ROLES["output"].names[source.naming or "huggingface"]
    stored = {bare_name(name, source.naming) for name in source.tensors}
    message = (
        f"{source.path}: {first_few(heads, 3)}: saved from {kind}. A Llama that predicts tokens "
        "has no such head"
    )
    if output and output not in stored and not (source.params and source.params.tied):
        names.append(output)
        message += (
            f", and {output}, which it needs, is not there. Convert the model that this one was "
            "trained from, or load this one as LlamaForCausalLM, which adds an untrained head, and "
            "save that"
        )
    else:
        message += (
            ". To convert the rest without it, load the folder as LlamaForCausalLM, which leaves "
            "it out, and save that"
        )
    return Problem(message, tuple(names))


def _placeholders(
    source: Checkpoint, empty: list[TensorInfo], known: Mapping[tuple[str, int | None], TensorInfo]
) -> Problem:
    names = tuple(tensor.name for tensor in empty)
    return Problem(
        f"{source.path}: {len(empty)} of {len(known)} weights are empty, shape "
        f"{list(empty[0].shape)}: {first_few(names, 3)}. DeepSpeed ZeRO-3 leaves such placeholders "
        "if the weights are not gathered when they are saved. Run zero_to_fp32.py in DeepSpeed's "
        "checkpoint, or save again with stage3_gather_16bit_weights_on_model_save",
        names,
    )


def _unknown(source: Checkpoint, rest: list[str]) -> Problem:
    """Return the error for all others; names that a Llama has without a prefix explain what lacks."""
    message = (
        f"{source.path}: {len(rest)} tensors do not belong to a Llama model: {first_few(rest)}"
    )
    naming = source.naming or "huggingface"
    # Each way in which all the names would be a Llama's, unless they are one's already.
    bare = [f"model.{name}" for name in rest]
    is_named = any(identify(name, naming) for name in rest)
    if source.format == "huggingface" and not is_named and all(identify(n, naming) for n in bare):
        message += (
            ". They lack 'model.' in front: saved from LlamaModel, not LlamaForCausalLM. Load it as "
            "LlamaForCausalLM and save that; a head that is not tied is then untrained"
        )
        return Problem(message, (*rest, *bare, "lm_head.weight"))
    for prefix in () if is_named else _prefixes(rest[0]):
        names = [name.removeprefix(prefix) for name in rest if name.startswith(prefix)]
        if len(names) < len(rest):
            break
        if all(identify(name, naming) for name in names):
            stored = {bare_name(name, naming) for name in source.tensors}
            if stored & set(names):
                message += f". They are a second model, under {prefix!r}; save one of the two"
                return Problem(message, tuple(rest))
            message += f". They have {prefix!r} in front of a Llama's names; save them without it"
            return Problem(message, (*rest, *names))
    other = other_of(rest)
    message += f". {_likely_cause(rest, source, other)}"
    return Problem(message, tuple(rest), explains_missing=other is not None)


def _prefixes(name: str) -> Iterator[str]:
    """Yield what may stand before a Llama's name in ``name``, the shortest first.

    No scheme's names have more parts than `_MOST_PARTS`, so that the work does not grow with the
    square of a name's length, which a file may choose.
    """
    parts = name.split(".")
    for n_before in range(max(1, len(parts) - _MOST_PARTS), len(parts)):
        yield ".".join(parts[:n_before]) + "."


def _likely_cause(unknown: list[str], source: Checkpoint, other: Other | None) -> str:
    known = [found[0] for name in unknown if (found := identify(name, source.naming))]
    if source.params and known:
        family = FAMILIES[source.params.family]
        roles = {role.name for role in known if role.optional} - family.extra
        if others := [one for one in FAMILIES.values() if roles and roles <= one.extra]:
            names = " or ".join(f"a {one.title} (model_type {one.model_type!r})" for one in others)
            return (
                f"They are those of {names}, and the parameters are those of a {family.title} "
                f"({family.model_type!r}): they are of different models"
            )
        return (
            f"The parameters say {source.params.n_layers} layers and these tensors are of later "
            "ones: the parameters and the weights are of different models"
        )
    if other:
        return f"They look like {other.what}. {other.remedy}"
    return "They are of another model family, or of an extension that must be merged first"
