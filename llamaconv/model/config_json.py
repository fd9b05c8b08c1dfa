"""config.json of transformers, read into `LlamaParams` and written back.

Reads the spelling of version 4 (``rope_theta``, ``rope_scaling``) and of version 5
(``rope_parameters``). A default for RoPE's base is never used without a warning, and what Llama
cannot express (other activations, other kinds of RoPE, quantised weights) is an error by name.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Collection, Mapping
from typing import Any

from llamaconv.model.families import FAMILIES, LLAMA, Family, family_named, why_refused
from llamaconv.model.params import (
    MOST,
    MOST_HEADS,
    MOST_LAYERS,
    OTHER_ROPE_TYPES,
    LlamaParams,
    RopeScaling,
    is_number,
    rope_entry,
)
from llamaconv.report.errors import Problem

TRANSFORMERS_DEFAULT_THETA = 10000.0
"""transformers' own default; old config.json files leave the entry out and rely on it."""


# Other spellings of entries that are written from the parameters.
_REPLACED = ("rope_parameters", "dtype")

# Entries that say how weights are quantised; the last is MLX's, which writes the first as well.
_QUANTISED = ("quantization_config", "compression_config", "quantization")

NOT_CARRIED = (*_QUANTISED, "auto_map")
"""Entries that do not hold for what is written: plain weights, without code of their own."""


def to_config(
    params: LlamaParams,
    dtype: str | None,
    base: Mapping[str, Any] | None = None,
    roles: Collection[str] = (),
) -> dict[str, Any]:
    """Return config.json for ``params``, in the spelling of transformers 4, which 5 reads as well.

    Args:
        params: The model's parameters.
        dtype: The dtype of the weights; None if they differ.
        base: Another config.json, whose further entries (token ids, …) are kept.
        roles: The roles of the tensors that are written; biases among them set the flags.
    """
    family = FAMILIES[params.family]
    config = {k: v for k, v in (base or {}).items() if k not in _REPLACED + NOT_CARRIED}
    config |= {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "hidden_act": "silu",
        "hidden_size": params.dim,
        "intermediate_size": params.ffn_dim,
        "num_hidden_layers": params.n_layers,
        "num_attention_heads": params.n_heads,
        "num_key_value_heads": params.n_kv_heads,
        "head_dim": params.head_dim,
        "vocab_size": params.vocab_size,
        "rms_norm_eps": params.norm_eps,
        "rope_theta": params.rope_theta,
        "rope_scaling": json.loads(params.rope_entry or "null")
        or _scaling_entry(params.rope_scaling),
        "tie_word_embeddings": params.tied,
        "torch_dtype": dtype,
        **family.flags_of(roles),
    }
    if params.max_position is not None:
        config["max_position_embeddings"] = params.max_position
    if params.window is None and _window(config, family, params.n_layers, params.max_position):
        config |= family.no_window
    return config


def _scaling_entry(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if scaling.is_linear:
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_position,
    }


# Entries that the shape of a tensor can replace: its role, and the axis.
_FROM_SHAPE = {
    "hidden_size": ("tok_embeddings", 1),
    "intermediate_size": ("w1", 0),
    "vocab_size": ("tok_embeddings", 0),
}


def from_config(
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    where: str = "config.json",
    is_plain: bool = False,
) -> tuple[LlamaParams | None, list[Problem]]:
    """Read the parameters from the entries of config.json.

    Args:
        config: The entries.
        shapes: One shape per role (``wq``, ``tok_embeddings``, …); used instead of entries that
            are missing.
        where: The file, for messages.
        is_plain: Whether all weights are known to be stored as floating-point numbers, so that a
            quantization_config is left over.

    Returns:
        The parameters, and every problem found. None if a size is missing or impossible; with
        other errors the parameters still serve to find what else is wrong. That a file is of
        another family explains whatever else is odd in it.
    """
    reader = ParamsReader(config, where)
    family, other_family = _family(reader)
    params = _params(reader, shapes, family)
    if other_family:
        reader.problems = [Problem(f"{where}: {other_family}")]
    else:
        _check_leftovers(reader, family, is_plain)
    return (params if reader.sized else None), reader.problems


def _params(
    reader: ParamsReader, shapes: Mapping[str, tuple[int, ...]], family: Family
) -> LlamaParams:
    """Read the parameters; whatever is wrong in them is added to ``reader``."""
    config = reader.values
    for entry, (role, axis) in _FROM_SHAPE.items():
        if entry not in config and len(shapes.get(role, ())) > axis:
            reader.values[entry] = shapes[role][axis]
            reader.warn(f"{entry} is missing; using {shapes[role][axis]} from the shape of {role}")
    dim = reader.count("hidden_size")
    n_layers = reader.count("num_hidden_layers", most=MOST_LAYERS)
    n_heads, n_kv_heads, head_dim = _heads(reader, dim, shapes, family)
    ffn_dim = reader.count("intermediate_size")
    vocab_size = reader.count("vocab_size")
    theta, scaling, kind_of_rope = _rope(reader)
    norm_eps = config.get("rms_norm_eps")
    if norm_eps is None:
        norm_eps = 1e-6
        reader.warn("rms_norm_eps is missing; using transformers' default of 1e-06")
    has_length = config.get("max_position_embeddings") is not None
    max_position = reader.count("max_position_embeddings") if has_length else None
    window = _window(config, family, n_layers, max_position)
    return LlamaParams(
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        ffn_dim=ffn_dim,
        vocab_size=vocab_size,
        norm_eps=reader.number("rms_norm_eps", norm_eps),
        rope_theta=theta,
        rope_scaling=scaling,
        tied=_tied(reader),
        max_position=max_position,
        family=family.model_type,
        window=reader.count("sliding_window", window) if window is not None else None,
        rope_entry=kind_of_rope,
    )


class ParamsReader:
    """Typed access to the entries of one file; collects problems instead of raising.

    Attributes:
        values: The entries.
        problems: What is wrong.
        sized: Whether every size so far was valid.
    """

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.values = dict(config)
        self.where = where
        self.problems: list[Problem] = []
        self.sized = True

    def error(self, message: str) -> None:
        """Add an error."""
        self.problems.append(Problem(f"{self.where}: {message}"))

    def size_error(self, message: str) -> None:
        """Add an error that leaves the model without parameters."""
        self.sized = False
        self.error(message)

    def warn(self, message: str, is_inherent: bool = False) -> None:
        """Add a warning; for ``is_inherent`` see `Problem`."""
        self.problems.append(
            Problem(f"{self.where}: {message}", level="warning", is_inherent=is_inherent)
        )

    def count(self, entry: str, default: int | None = None, most: int = MOST) -> int:
        """Return a whole number from 1 to ``most``; after an error, 1."""
        value = self.values.get(entry)
        if value is None and default is not None:
            return default
        found = "it is missing" if value is None else f"got {value!r}"
        if type(value) is not int or value < 1:
            self.size_error(f"{entry} must be a positive whole number; {found}")
        elif value > most:
            self.size_error(f"{entry} must be at most {most}, more than any Llama has; {found}")
        else:
            return value
        return 1

    def number(self, entry: str, value: Any) -> float:
        """Return ``value`` as a positive number; after an error, 1."""
        if is_number(value):
            return float(value)
        self.error(f"{entry} must be a positive number; got {value!r}")
        return 1.0


def _tied(reader: ParamsReader) -> bool:
    # LlamaConfig's own default is an untied head.
    tied = reader.values.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        reader.error(f"tie_word_embeddings must be true or false; got {tied!r}")
    return tied is True


def _family(reader: ParamsReader) -> tuple[Family, str]:
    """Return the family, or Llama and why it is none of those that are converted."""
    name, classes = reader.values.get("model_type"), reader.values.get("architectures")
    classes = classes if isinstance(classes, list) else []
    if family := family_named(name):
        if foreign := [one for one in classes if not _is_of(one, family)]:
            reader.warn(
                f"model_type is {name!r}, but architectures is {foreign}; taken as {name!r}"
            )
        return family, ""
    converted = f"llamaconv converts {', '.join(map(repr, FAMILIES))} only"
    if reason := why_refused(name):
        return LLAMA, f"model_type {name!r} is not supported: {reason} {converted}"
    if name is not None:
        return LLAMA, (
            f"model_type {name!r} is not supported; {converted}, because other families differ in "
            "tensors or in the rotation"
        )
    if not classes:
        return LLAMA, ""
    for one in FAMILIES.values():
        if all(_is_of(name, one) for name in classes):
            return one, ""
    return LLAMA, (
        f"model_type is missing and architectures is {classes}, which is not supported; {converted}"
    )


def _is_of(name: object, family: Family) -> bool:
    """Return whether a class of transformers is of the family."""
    start = family.architecture.removesuffix("ForCausalLM").lower()
    return isinstance(name, str) and name.lower().startswith(start)


def _check_leftovers(reader: ParamsReader, family: Family, is_plain: bool) -> None:
    """Report entries that mean another model than a plain one, or that no longer hold."""
    activation = reader.values.get("hidden_act", "silu")
    if activation != "silu":
        reader.error(f"hidden_act must be 'silu' in a {family.title}; got {activation!r}")
    if found := {entry: value for entry in _QUANTISED if (value := reader.values.get(entry))}:
        entries = " and ".join(f"{entry} ({_scheme(value)})" for entry, value in found.items())
        if is_plain:
            reader.warn(
                f"{entries} is left over: every tensor is stored as plain floating-point numbers. "
                "It is ignored and not written; remove it here as well, or loaders of this folder "
                "will fail or quantise"
            )
        else:
            message = (
                f"{reader.where}: the weights are quantised, as {entries} says, and llamaconv does "
                "not convert quantised weights. Use the repository's unquantised weights"
            )
            reader.problems.append(Problem(message, tuple(found)))
    if code := reader.values.get("auto_map"):
        reader.warn(
            f"auto_map names code of the model's own ({reprlib.repr(code)}), which may compute "
            f"something else; the model is taken as transformers' {family.title}, and the entry is "
            "not written"
        )


def _scheme(quantization: object) -> str:
    """Return the scheme that an entry about quantisation states, or the entry itself."""
    scheme = quantization.get("quant_method") if isinstance(quantization, dict) else None
    return repr(scheme) if scheme else reprlib.repr(quantization)


def kv_heads(
    reader: ParamsReader,
    entry: str,
    n_heads: int,
    head_dim: int,
    shapes: Mapping[str, tuple[int, ...]],
    default: int | None = None,
) -> int:
    """Return the number of kv heads: what ``entry`` says, else what the rows of k are.

    Without the entry there are ``default``, or else one kv head per query head (transformers'
    LlamaConfig, Meta's code).
    """
    q_rows, k_rows = ((*shapes.get(role, ()), 0)[0] for role in ("wq", "wk"))
    found = k_rows // head_dim
    is_whole = q_rows == n_heads * head_dim and k_rows == found * head_dim
    if reader.values.get(entry) is None and is_whole and 0 < found < n_heads:
        reader.warn(f"{entry} is missing; using {found}, from the {k_rows} rows of k")
        return found
    if entry in reader.values:
        default = None  # null stands for one per query head in every family
    return reader.count(entry, default=default or n_heads, most=MOST_HEADS)


def _heads(
    reader: ParamsReader, dim: int, shapes: Mapping[str, tuple[int, ...]], family: Family
) -> tuple[int, int, int]:
    """Return the number of heads and of kv heads, and rows per head."""
    n_heads = reader.count("num_attention_heads", most=MOST_HEADS)
    head_dim = _head_dim(reader, dim, n_heads, shapes.get("wq"), family)
    usual = family.defaults.get("num_key_value_heads")
    n_kv_heads = kv_heads(reader, "num_key_value_heads", n_heads, head_dim, shapes, usual)
    if n_heads % n_kv_heads:
        reader.size_error(
            f"num_attention_heads {n_heads} must be a multiple of num_key_value_heads "
            f"{n_kv_heads}, because query heads share kv heads in equal groups"
        )
    if head_dim % 2:
        reader.size_error(f"head_dim must be even, because RoPE rotates pairs; got {head_dim}")
    return n_heads, n_kv_heads, head_dim


def _head_dim(
    reader: ParamsReader, dim: int, n_heads: int, wq: tuple[int, ...] | None, family: Family
) -> int:
    from_rows = wq[0] // n_heads if wq and wq[0] and wq[0] % n_heads == 0 else None
    if reader.values.get("head_dim") is not None:
        return reader.count("head_dim")
    usual = family.defaults.get("head_dim")
    if from_rows is None:
        if usual is None and dim % n_heads:
            reader.size_error(
                f"head_dim is missing, and hidden_size {dim} is not a multiple of "
                f"num_attention_heads {n_heads}"
            )
        return usual or dim // n_heads or 1
    if from_rows != (usual or dim / n_heads):
        reader.warn(
            f"head_dim is missing; using {from_rows} from the {wq[0] if wq else 0} rows of q, "
            f"not {usual or 'hidden_size / num_attention_heads'}"
        )
    return from_rows


def _window(
    config: Mapping[str, Any], family: Family, n_layers: int, max_position: int | None
) -> Any:
    """Return how far some layer looks back, which may be no number; None if each sees all.

    An entry that is missing means what transformers takes it to mean. From a certain layer on, or those
    that are named, have the window.
    """
    entries = {**family.defaults, **config}
    window, kinds = entries.get("sliding_window"), entries.get("layer_types")
    first = entries.get("max_window_layers", 0)
    if isinstance(kinds, list):
        slides = "sliding_attention" in kinds
    else:
        slides = not isinstance(first, int) or n_layers > first
    if not family.window or not entries.get(family.window) or window is None or not slides:
        return None
    is_wide = is_number(window) and max_position is not None and window >= max_position
    return None if is_wide else window


def _rope(reader: ParamsReader) -> tuple[float, RopeScaling | None, str]:
    """Return RoPE's base and scaling, from either spelling of transformers, or the kind of RoPE."""
    new, old = reader.values.get("rope_parameters"), reader.values.get("rope_scaling")
    for entry, value in (("rope_parameters", new), ("rope_scaling", old)):
        if value is not None and not isinstance(value, dict):
            reader.error(f"{entry} must be an object; got {value!r}")
            return 1.0, None, ""
    new, old = new or {}, old or {}
    for entry in set(old) & set(new):
        if old[entry] != new[entry]:
            reader.error(
                f"rope_scaling has {entry} {old[entry]!r}, but rope_parameters has "
                f"{new[entry]!r}; keep the right one"
            )
    described = {**old, **new}
    theta = _theta(reader, described)
    if described.get("partial_rotary_factor", 1) != 1:
        reader.error(
            f"partial_rotary_factor must be 1, because Llama rotates the whole head; "
            f"got {described['partial_rotary_factor']!r}"
        )
    kind = described.get("rope_type", described.get("type", "default"))
    if kind in OTHER_ROPE_TYPES:
        return theta, None, rope_entry(described)
    return theta, _scaling(reader, described, kind), ""


def _theta(reader: ParamsReader, described: Mapping[str, Any]) -> float:
    theta = described.get("rope_theta", reader.values.get("rope_theta"))
    if theta is None:
        theta = TRANSFORMERS_DEFAULT_THETA
        reader.warn(
            f"rope_theta and rope_parameters are missing; using transformers' default of "
            f"{theta:g}. Llama 3 uses 500000: add the entry if this is one"
        )
    elif reader.values.get("rope_theta") not in (None, theta):
        reader.error(
            f"rope_theta is {reader.values['rope_theta']!r}, but rope_parameters has {theta!r}; "
            "keep the right one"
        )
    return reader.number("rope_theta", theta)


def _scaling(
    reader: ParamsReader, described: Mapping[str, Any], kind: object
) -> RopeScaling | None:
    if kind == "default":
        if "factor" in described:
            reader.warn(
                f"the RoPE scaling has a factor of {described['factor']!r}, but no type that uses "
                "it; ignored, as in transformers"
            )
        return None
    if kind == "linear":
        return RopeScaling.linear(reader.number("factor", described.get("factor")))
    if kind != "llama3":
        known = ("default", "linear", "llama3", *OTHER_ROPE_TYPES)
        reader.error(f"the RoPE type must be one of {', '.join(known)}; got {kind!r}")
        return None
    entries = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    factor, low, high, length = (reader.number(entry, described.get(entry)) for entry in entries)
    if low == high:
        reader.error(f"low_freq_factor and high_freq_factor must differ; both are {low:g}")
    return RopeScaling(factor, low, high, int(length))
