"""config.json of transformers, read into `LlamaParams` and written back.

Reads the spelling of version 4 (``rope_theta``, ``rope_scaling``) and of version 5
(``rope_parameters``). RoPE's base and scaling are never guessed in silence, and what Llama
cannot express (other activations, other kinds of RoPE, quantised weights) is a problem by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llamaconv.params import MOST, MOST_HEADS, MOST_LAYERS, LlamaParams, RopeScaling, is_number
from llamaconv.problems import Problem

# transformers' own default, which old config.json files rely on by leaving the entry out.
TRANSFORMERS_DEFAULT_THETA = 10000.0


def to_config(
    params: LlamaParams, dtype: str | None, base: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """config.json for ``params``, in the spelling of transformers 4, which 5 reads as well.

    ``dtype`` is that of the weights, None where they differ. ``base`` is another config.json
    whose further entries (token ids, …) are kept.
    """
    config = {k: v for k, v in (base or {}).items() if k not in ("rope_parameters", "dtype")}
    scaling = params.rope_scaling
    config |= {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
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
        "rope_scaling": None
        if scaling is None
        else {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position,
        },
        "tie_word_embeddings": params.tied,
        "torch_dtype": dtype,
    }
    if params.max_position is not None:
        config["max_position_embeddings"] = params.max_position
    return config


# The entries of config.json that the shapes of tensors can stand in for: role and axis.
_FROM_SHAPE = {
    "hidden_size": ("tok_embeddings", 1),
    "intermediate_size": ("w1", 0),
    "vocab_size": ("tok_embeddings", 0),
}


def from_config(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str = "config.json"
) -> tuple[LlamaParams | None, list[Problem]]:
    """Parameters from transformers' config.json, with every problem found.

    ``shapes`` are those of the tensors, one a role (``wq``, ``tok_embeddings``, …), and
    supply what the file leaves out. None where a size is missing or impossible; with other
    errors the parameters still serve to find what else is wrong.
    """
    reader = ParamsReader(config, where)
    _check_family(reader)
    for entry, (role, axis) in _FROM_SHAPE.items():
        if entry not in config and len(shapes.get(role, ())) > axis:
            reader.values[entry] = shapes[role][axis]
            reader.warn(f"{entry} is absent; {shapes[role][axis]} is taken from {role}")
    dim = reader.count("hidden_size")
    n_layers = reader.count("num_hidden_layers", most=MOST_LAYERS)
    n_heads = reader.count("num_attention_heads", most=MOST_HEADS)
    # An absent num_key_value_heads means one kv head a query head (transformers' LlamaConfig).
    n_kv_heads = reader.count("num_key_value_heads", default=n_heads, most=MOST_HEADS)
    ffn_dim = reader.count("intermediate_size")
    vocab_size = reader.count("vocab_size")
    head_dim = _head_dim(reader, dim, n_heads, shapes.get("wq"))
    if n_heads % n_kv_heads:
        reader.size_error(
            f"num_attention_heads {n_heads} is not a multiple of num_key_value_heads "
            f"{n_kv_heads}: query heads share kv heads in equal groups"
        )
    if head_dim % 2:
        reader.size_error(f"head_dim {head_dim} is odd: RoPE turns pairs, so it has to be even")
    theta, scaling = _rope(reader)
    norm_eps = config.get("rms_norm_eps")
    if norm_eps is None:
        norm_eps = 1e-6
        reader.warn("rms_norm_eps is absent; transformers' default of 1e-06 is taken")
    params = LlamaParams(
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
        max_position=None
        if config.get("max_position_embeddings") is None
        else reader.count("max_position_embeddings"),
    )
    return (params if reader.sized else None), reader.problems


class ParamsReader:
    """Typed access to one configuration file; collects problems instead of raising."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.values = dict(config)
        self.where = where
        self.problems: list[Problem] = []
        self.sized = True

    def error(self, message: str) -> None:
        self.problems.append(Problem(f"{self.where}: {message}"))

    def size_error(self, message: str) -> None:
        self.sized = False
        self.error(message)

    def warn(self, message: str, is_inherent: bool = False) -> None:
        self.problems.append(
            Problem(f"{self.where}: {message}", level="warning", is_inherent=is_inherent)
        )

    def count(self, entry: str, default: int | None = None, most: int = MOST) -> int:
        """A whole number from 1 to ``most``; 1 stands in where there is none, beside an error."""
        value = self.values.get(entry)
        if value is None and default is not None:
            return default
        found = "is absent" if value is None else f"is {value!r}"
        if type(value) is not int or value < 1:
            self.size_error(f"{entry} {found}; a positive whole number was expected")
        elif value > most:
            self.size_error(f"{entry} {found}; no Llama has more than {most}")
        else:
            return value
        return 1

    def number(self, entry: str, value: Any) -> float:
        if is_number(value):
            return float(value)
        self.error(f"{entry} is {value!r}; a positive number was expected")
        return 1.0


def _tied(reader: ParamsReader) -> bool:
    # LlamaConfig's own default is an untied head.
    tied = reader.values.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        reader.error(f"tie_word_embeddings is {tied!r}; true or false was expected")
    return tied is True


def _check_family(reader: ParamsReader) -> None:
    """Errors for models that are not plain Llama, by name."""
    family = reader.values.get("model_type", "llama")
    if family != "llama":
        reader.error(
            f"model_type is {family!r}; llamaconv converts 'llama' only, other families "
            "differ in tensors or in the rotation"
        )
    activation = reader.values.get("hidden_act", "silu")
    if activation != "silu":
        reader.error(f"hidden_act is {activation!r}; Llama's feed-forward uses 'silu'")
    quantization = reader.values.get("quantization_config")
    if quantization:
        scheme = quantization.get("quant_method") if isinstance(quantization, dict) else None
        reader.error(
            f"quantization_config names the scheme {scheme or quantization!r}; quantised "
            "weights are not converted. Use the repository's unquantised weights"
        )


def _head_dim(reader: ParamsReader, dim: int, n_heads: int, wq: tuple[int, ...] | None) -> int:
    from_rows = wq[0] // n_heads if wq and wq[0] and wq[0] % n_heads == 0 else None
    if reader.values.get("head_dim") is not None:
        return reader.count("head_dim")
    if from_rows is None:
        if dim % n_heads:
            reader.size_error(
                f"head_dim is absent and hidden_size {dim} is not a multiple of "
                f"num_attention_heads {n_heads}"
            )
        return dim // n_heads or 1
    if from_rows * n_heads != dim:
        reader.warn(
            f"head_dim is absent; {from_rows} is taken from the {wq[0] if wq else 0} rows of q, "
            f"not hidden_size / num_attention_heads"
        )
    return from_rows


def _rope(reader: ParamsReader) -> tuple[float, RopeScaling | None]:
    """RoPE's base and scaling, from either spelling of transformers."""
    new, old = reader.values.get("rope_parameters"), reader.values.get("rope_scaling")
    for entry, value in (("rope_parameters", new), ("rope_scaling", old)):
        if value is not None and not isinstance(value, dict):
            reader.error(f"{entry} is {value!r}; an object was expected")
            return 1.0, None
    new, old = new or {}, old or {}
    described = {**old, **new}
    for entry in set(old) & set(new):
        if old[entry] != new[entry]:
            reader.error(
                f"rope_scaling gives {entry} {old[entry]!r}, "
                f"rope_parameters gives {new[entry]!r}; keep the one that is right"
            )
    theta = described.get("rope_theta", reader.values.get("rope_theta"))
    if theta is None:
        theta = TRANSFORMERS_DEFAULT_THETA
        reader.warn(
            f"rope_theta is absent, and rope_parameters too; transformers' default of {theta:g} "
            "is taken. Llama 3 uses 500000: add the entry if this is one"
        )
    elif reader.values.get("rope_theta") not in (None, theta):
        reader.error(
            f"rope_theta is {reader.values['rope_theta']!r} and rope_parameters gives {theta!r}; "
            "keep the one that is right"
        )
    theta = reader.number("rope_theta", theta)
    if described.get("partial_rotary_factor", 1) != 1:
        reader.error(
            f"partial_rotary_factor is {described['partial_rotary_factor']!r}; "
            "Llama turns the whole head"
        )
    kind = described.get("rope_type", described.get("type", "default"))
    if kind == "default":
        if "factor" in described:
            reader.warn(
                f"the RoPE scaling has a factor of {described['factor']!r} and no kind that uses one; "
                "transformers passes it by, and so is done here"
            )
        return theta, None
    if kind != "llama3":
        reader.error(
            f"the RoPE type is {kind!r}; TorchTitan's and Meta's Llama express 'default' and "
            "'llama3' only, so the model would compute something else"
        )
        return theta, None
    entries = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    factor, low, high, length = (reader.number(entry, described.get(entry)) for entry in entries)
    if low == high:
        reader.error(f"low_freq_factor and high_freq_factor are both {low:g}; they have to differ")
    return theta, RopeScaling(factor, low, high, int(length))
