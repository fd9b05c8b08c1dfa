"""Check the tensors of a plan: shapes, dtypes, limits of Meta's format, signs of no training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from llamaconv.checkpoint.checkpoint import OF_TRAINERS, Checkpoint, ModelConfig
from llamaconv.checkpoint.reader import all_one
from llamaconv.checkpoint.tensors import WEIGHT_DTYPES, TensorInfo
from llamaconv.model.families import FAMILIES
from llamaconv.model.names import ROLES, whole
from llamaconv.model.params import LlamaParams
from llamaconv.model.params_json import unfit
from llamaconv.plan.plan import Move
from llamaconv.plan.target import Target
from llamaconv.report.errors import Problem, first_few, warning
from llamaconv.torchtitan.releases import ROTATIONS

Known = Mapping[tuple[str, int | None], TensorInfo]
"""Tensors by role name and layer."""


def check_tensors(
    source: Checkpoint, target: Target, known: Known, params: LlamaParams
) -> Iterator[Problem]:
    """Yield every problem with the tensors of a source.

    Args:
        source: The checkpoint that holds them.
        target: What they are converted to.
        known: The tensors that belong to a Llama.
        params: The parameters that they should fit.
    """
    yield from _wrong_shapes(source, known, params)
    yield from _wrong_dtypes(known)
    if target.format == "meta":
        yield from _unfit_for_meta(target, params)
    if target.format != "huggingface":
        yield from _only_in_huggingface(source, params)
    norms = [tensor for (role, _), tensor in known.items() if role.endswith("norm")]
    # Norms start as ones, and a trainer that never loaded weights saves them so.
    if source.format in OF_TRAINERS and norms and all(map(all_one, norms)):
        yield warning(
            f"{source.path}: looks like a random initialisation: all {len(norms)} norms are "
            "exactly 1, as before any training. Check that the weights were loaded"
        )


# Why other programs than transformers compute something else with a kind of RoPE.
_OTHER_ROPES = {
    "yarn": "transformers scales cosine and sine by an attention factor (0.1 ln(factor) + 1 unless it is "
    "stated). The RoPE of TorchTitan 0.3.0 has yarn's frequencies without it, Meta's code neither. If the "
    "entry was only added for texts longer than the model was trained on, as Qwen's model cards advise, "
    "remove it from a copy of config.json and pass that with --assets",
    "longrope": "it has a factor per pair, one list for short and one for long texts, and an attention "
    "factor. No RoPE of TorchTitan has these, nor Meta's code",
}


def _only_in_huggingface(source: Checkpoint, params: LlamaParams) -> Iterator[Problem]:
    """Yield what transformers computes and TorchTitan and Meta's code do not."""
    where = source.config.path if source.config else source.path
    if params.rope_type == "dynamic":
        length = params.max_position or "max_position_embeddings"
        yield warning(
            f"{where}: dynamic RoPE scaling is no scaling up to {length} positions, and raises the base "
            "beyond. The target has none: use it for contexts of up to that length"
        )
    elif params.rope_type:
        yield Problem(
            f"{where}: the RoPE type {params.rope_type!r} only exists in Hugging Face's format (--to hf): "
            f"{_OTHER_ROPES[params.rope_type]}"
        )
    if params.window is not None:
        yield Problem(
            f"{where}: some layers look back {params.window} tokens only (sliding_window), of up to "
            f"{params.max_position or 'unknown'}; TorchTitan's and Meta's layers see all, so longer texts "
            "would give something else. --to hf keeps it. To train contexts of at most "
            f"{params.window} tokens, where both are equal, set max_position_embeddings to {params.window} "
            "in a copy of config.json and pass that with --assets"
        )


def check_dtype(config: ModelConfig, moves: Iterable[Move], target: Target) -> Iterator[Problem]:
    """Yield a warning if config.json says another dtype than the one that is written.

    transformers loads weights in the dtype that config.json says, so the numbers would differ.
    """
    stated = config.entries.get("torch_dtype", config.entries.get("dtype"))
    written = sorted({move.dtype for move in moves if move.target is not None})
    if target.format != "huggingface" or target.dtype != "keep" or not isinstance(stated, str):
        return
    if written and written != [stated.removeprefix("torch.")]:
        yield warning(
            f"{config.path}: torch_dtype is {stated}, but the weights are stored as "
            f"{' and '.join(written)}. The written config.json says "
            f"{written[0] if len(written) == 1 else 'null'}; choose another with --dtype"
        )


def check_joined(moves: Iterable[Move]) -> Iterator[Problem]:
    """Yield an error if roles of several dtypes would have to share one tensor of the target."""
    dtypes: dict[str, dict[str, str]] = {}
    for move in moves:
        if move.target and (name := whole(move.target)) != move.target:
            dtypes.setdefault(name, {})[move.dtype] = move.source
    mixed = [(name, found) for name, found in dtypes.items() if len(found) > 1]
    if mixed:
        name, found = mixed[0]
        sources = ", ".join(f"{source} is {dtype}" for dtype, source in found.items())
        yield Problem(
            f"{len(mixed)} tensors of the target hold several roles, and those have different "
            f"dtypes, such as {name}: {sources}. Choose one with --dtype",
            tuple(source for _, one in mixed for source in one.values()),
        )


def check_layout(params: LlamaParams, target: Target) -> Iterator[Problem]:
    """Yield a warning if no stock model of TorchTitan rotates the rows of a DCP as they will be."""
    family = FAMILIES[params.family]
    if target.layout == family.titan.layout:
        return
    how = {
        "half_split": "keeps q and k rows as transformers has them",
        "interleaved": "reorders q and k rows",
    }
    yield warning(
        f"--rope {target.layout} {how[target.layout]}. Every stock {family.titan.module} of "
        f"TorchTitan rotates {family.titan.layout} pairs, so this one needs "
        f"{ROTATIONS[target.layout]}"
    )


def _wrong_shapes(source: Checkpoint, known: Known, params: LlamaParams) -> Iterator[Problem]:
    """Yield one problem if each axis is wrong in one way, else one per role and shape."""
    wrong: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    found: dict[str, set[int]] = {}
    for (name, _), tensor in known.items():
        axes, expected = ROLES[name].axes, ROLES[name].shape(params)
        # The shape of a packed weight follows from its packing, and `_wrong_dtypes` reports that.
        if tensor.dtype not in WEIGHT_DTYPES or tensor.shape == expected:
            continue
        wrong.setdefault((name, tensor.shape), []).append(tensor.name)
        if len(tensor.shape) != len(axes):
            found.setdefault("", set()).update((0, 1))
        for axis, n, actual in zip(axes, expected, tensor.shape, strict=False):
            if n != actual:
                found.setdefault(axis, set()).add(actual)
    where = "the receipt" if source.receipt else "config.json"
    if source.config:
        where = source.config.path.name
    cause = f"{where} and the weights are of different models"
    if source.format == "meta":
        cause += ", or the last files are missing"
    if found.keys() == {"vocab_size"}:
        cause = f"Tokens were added or padded: correct vocab_size in {where}"
    lines = []
    for (name, shape), names in wrong.items():
        role = ROLES[name]
        formula = ", ".join(f"{axis} = {getattr(params, axis)}" for axis in role.axes)
        lines.append(
            f"{first_few(names, 3)}: expected shape {list(role.shape(params))}, "
            f"found {list(shape)} ({formula}, {params.n_heads} heads and {params.n_kv_heads} kv "
            f"heads of {params.head_dim})"
        )
    names_of = [tuple(names) for names in wrong.values()]
    if len(lines) > 1 and all(len(lengths) == 1 for lengths in found.values()):
        axes_said = ", ".join(
            f"{axis} is {getattr(params, axis)} and the weights have {min(lengths)}"
            for axis, lengths in found.items()
        )
        every = tuple(name for names in names_of for name in names)
        yield Problem(
            f"{source.path}: {len(every)} tensors have other shapes than {where} says: "
            f"{axes_said}; such as {lines[0]}. {cause}",
            every,
        )
        return
    for line, its_names in zip(lines, names_of, strict=True):
        yield Problem(f"{line}. {cause}", its_names)


def _wrong_dtypes(known: Known) -> Iterator[Problem]:
    dtypes: dict[str, list[str]] = {}
    for tensor in known.values():
        if tensor.dtype not in WEIGHT_DTYPES:
            dtypes.setdefault(tensor.dtype, []).append(tensor.name)
    for dtype, names in dtypes.items():
        is_quantised = dtype.startswith(("float8", "int", "uint"))
        yield Problem(
            f"{len(names)} tensors are stored as {dtype}, "
            f"{'a quantised scheme' if is_quantised else 'not a dtype of weights'}: "
            f"{first_few(names, 3)}. Use the unquantised weights, in one of "
            f"{', '.join(WEIGHT_DTYPES)}",
            tuple(names),
        )


def _unfit_for_meta(target: Target, params: LlamaParams) -> Iterator[Problem]:
    yield from unfit(params)
    for count in ("n_heads", "n_kv_heads", "ffn_dim", "vocab_size"):
        if getattr(params, count) % target.shards:
            yield Problem(
                f"--shards {target.shards}: {count} {getattr(params, count)} cannot be cut into "
                "that many equal parts, as Meta's files need. Choose another number"
            )
