"""ONE table: the model families that share Llama's skeleton, and what differs in each.

A family is one line of `FAMILIES`, with rows in `llamaconv.model.names` for tensors that no family
has yet. Everything else asks this table: config.json, plans, checks, the reference model, advice.
`OTHERS` says of families that look alike why they are refused.

Sources: the configuration and modelling files of transformers 5.24, one folder per ``model_type``;
TorchTitan 0.3.0's wheel.

Limit: what a family computes differently must be visible in its tensors. `llamaconv.model.forward`
applies a bias or a norm if the tensor is there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

Layout = Literal["interleaved", "half_split"]
"""Which rows of a head of q or k form a pair that RoPE rotates, see `rope`."""


@dataclass(frozen=True)
class TitanModel:
    """The model of TorchTitan that computes what a family computes.

    Attributes:
        module: Its name, as the flags of a release have it.
        classes: What the names of its classes begin with in 0.3.0: ``…Model``, ``…TransformerBlock``.
        config: The configuration of 0.3.0 that a written module starts from.
        layout: The layout of q and k rows that its stock flavours rotate.
    """

    module: str
    classes: str
    config: str
    layout: Layout


_LLAMA3 = TitanModel("llama3", "Llama3", "llama3_8b", "interleaved")
_QWEN3 = TitanModel("qwen3", "Qwen3", "qwen3_0_6b", "half_split")


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        model_type: Its name in config.json.
        title: Its name in messages.
        architecture: The class of transformers that predicts tokens.
        titan: The model of TorchTitan that computes the same.
        roles: Roles that it has in every layer and some other family has not.
        flags: Entries of config.json, each with the roles whose biases transformers reads if it is
            true.
        defaults: What transformers takes an entry of config.json to be if it is missing, as far as
            that differs between families.
        window: The entry without which no layer has a sliding window; "" if none can have one.
        no_window: The entries that say that no layer has one.
    """

    model_type: str
    title: str
    architecture: str
    titan: TitanModel = _LLAMA3
    roles: tuple[str, ...] = ()
    flags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    window: str = ""
    no_window: Mapping[str, Any] = field(default_factory=dict)

    @property
    def extra(self) -> frozenset[str]:
        """Every role that it may have and some other family has not."""
        return frozenset((*self.roles, *(role for roles in self.flags.values() for role in roles)))

    def flags_of(self, roles: Collection[str]) -> dict[str, bool]:
        """Return the entries that tell transformers which biases a model with ``roles`` has."""
        return {flag: not set(its).isdisjoint(roles) for flag, its in self.flags.items()}


_ATTENTION = ("wq.bias", "wk.bias", "wv.bias", "wo.bias")
_MLP = ("w1.bias", "w2.bias", "w3.bias")

_QWEN: dict[str, Any] = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "bos_token_id": None,
    "eos_token_id": None,
}

_TABLE = (
    Family(
        "llama",
        "Llama",
        "LlamaForCausalLM",
        flags={"attention_bias": _ATTENTION, "mlp_bias": _MLP},
        defaults={"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    ),
    Family(
        "qwen2",
        "Qwen 2",
        "Qwen2ForCausalLM",
        roles=("wq.bias", "wk.bias", "wv.bias"),
        defaults=_QWEN,
        window="use_sliding_window",
        no_window={"use_sliding_window": False},
    ),
    Family(
        "qwen3",
        "Qwen 3",
        "Qwen3ForCausalLM",
        titan=_QWEN3,
        roles=("q_norm", "k_norm"),
        flags={"attention_bias": _ATTENTION},
        defaults=_QWEN | {"head_dim": 128},
        window="use_sliding_window",
        no_window={"use_sliding_window": False},
    ),
    Family(
        "mistral",
        "Mistral",
        "MistralForCausalLM",
        defaults={
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        window="sliding_window",
        no_window={"sliding_window": None},
    ),
)

FAMILIES: Mapping[str, Family] = MappingProxyType({one.model_type: one for one in _TABLE})
"""The families by ``model_type``."""

_OWN_MODEL = (
    "TorchTitan 0.3.0 has a model of its own for it, which starts from the Hugging Face folder with "
    "--checkpoint.initial_load_in_hf"
)
_EXPERTS = "it is a mixture of experts"

# What is refused by name: the values of model_type, why, and the remedy if there is one.
_OTHERS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (
        ("gemma",),
        "its norms multiply by 1 + weight and its feed-forward uses gelu, with Llama's own tensor names",
        "",
    ),
    (
        ("gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text", "gemma4", "gemma4_text"),
        "it has further norms after attention and feed-forward, which multiply by 1 + weight, and "
        "sliding windows",
        "",
    ),
    (
        ("phi3",),
        "it stores q, k and v as one matrix, gate and up as another, and its long contexts need longrope",
        "",
    ),
    (
        ("olmo2", "olmo3"),
        "its norms come after attention and feed-forward, and those of q and k go over all heads at once",
        "",
    ),
    (("smollm3",), "every fourth layer has no RoPE, with Llama's own tensor names", ""),
    (
        ("granite",),
        "it multiplies embedding, attention, residuals and logits by factors, with Llama's own tensor "
        "names",
        "",
    ),
    (("helium",), "rows of q and k are interleaved in its Hugging Face files, unlike Llama's", ""),
    (
        ("llama4", "llama4_text"),
        f"{_EXPERTS}, its rows are interleaved, and some of its layers have no RoPE",
        "",
    ),
    (("qwen3_moe",), _EXPERTS, _OWN_MODEL),
    (("deepseek_v3", "gpt_oss"), f"{_EXPERTS}, with another attention", _OWN_MODEL),
    (("mixtral", "qwen2_moe", "olmoe", "granitemoe", "phimoe", "ernie4_5_moe"), _EXPERTS, ""),
)


def why_refused(model_type: object) -> str:
    """Return why a ``model_type`` is not converted, and the remedy, as sentences; "" if unknown."""
    for names, reason, remedy in _OTHERS:
        if model_type in names:
            return f"{reason}. {remedy}".removesuffix(". ") + "."
    return ""


LLAMA = FAMILIES["llama"]
"""The family of a checkpoint that does not name one, such as Meta's files."""

EXTRA_ROLES = frozenset(role for one in _TABLE for role in one.extra)
"""The roles without which a model of some family is complete."""


def family_named(model_type: object) -> Family | None:
    """Return the family of a ``model_type``, which may be any value of a JSON file."""
    return FAMILIES.get(model_type) if isinstance(model_type, str) else None


def family_with(roles: Collection[str]) -> Family:
    """Return the family that ``roles`` show: it needs most of them, and may have all of them.

    The first of the table if several do, and Llama if none does.
    """
    extra = set(roles) & {role for one in _TABLE for role in one.extra}
    fitting = [one for one in _TABLE if set(one.roles) <= extra <= one.extra]
    return max(fitting, key=lambda one: len(one.roles), default=LLAMA)
