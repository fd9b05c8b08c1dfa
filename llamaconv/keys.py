"""ONE table: what each tensor of a Llama is called in every naming, and its shape.

A row a role, a column a naming. Everything that renames, checks a shape, or asks whether
rows belong to heads reads this table. ``N`` stands for the layer.

Names of TorchTitan were read in its released wheels: ``titan-0.2`` serves 0.1.0 to 0.2.2,
``titan-0.3`` serves 0.3.0 and later; ``titan-2024`` is the first with ``model.`` in front, as
its conversion script of 2024 wrote. None means that the naming has no place for the role.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

from llamaconv.params import LlamaParams

# How the rows of a head of q or k are paired by RoPE, see `rope`.
Layout = Literal["interleaved", "half_split"]

Kind = Literal["embedding", "q and k", "v and o", "feed-forward", "norms", "head"]
"""What a role is for; the groups that tables and pictures show."""

# Newest first: names that fit several are taken for the newest.
GENERATIONS = ("titan-0.3", "titan-0.2", "titan-2024")
NAMINGS = ("huggingface", "meta", "titan-0.2", "titan-0.3", "titan-2024")

_L = "layers.N."
_T = f"{_L}attention."
_Q = f"{_T}qkv_linear."
_F = f"{_L}feed_forward."
_HA, _HM = f"model.{_L}self_attn.", f"model.{_L}mlp."

# role, shape, heads, kind, cut, then the name in each of NAMINGS
_TABLE: tuple[tuple[str, tuple[str, ...], str | None, Kind, int, *tuple[str | None, ...]], ...] = (
    ("tok_embeddings", ("vocab_size", "dim"), None, "embedding", 0, "model.embed_tokens.weight", "tok_embeddings.weight", "tok_embeddings.weight", "tok_embeddings.weight", "model.tok_embeddings.weight"),
    ("attention_norm", ("dim",), None, "norms", 0, f"model.{_L}input_layernorm.weight", f"{_L}attention_norm.weight", f"{_L}attention_norm.weight", f"{_L}attention_norm.weight", f"model.{_L}attention_norm.weight"),
    ("wq", ("q_rows", "dim"), "n_heads", "q and k", 0, f"{_HA}q_proj.weight", f"{_T}wq.weight", f"{_T}wq.weight", f"{_Q}wq.weight", f"model.{_T}wq.weight"),
    ("wk", ("kv_rows", "dim"), "n_kv_heads", "q and k", 0, f"{_HA}k_proj.weight", f"{_T}wk.weight", f"{_T}wk.weight", f"{_Q}wk.weight", f"model.{_T}wk.weight"),
    ("wv", ("kv_rows", "dim"), None, "v and o", 0, f"{_HA}v_proj.weight", f"{_T}wv.weight", f"{_T}wv.weight", f"{_Q}wv.weight", f"model.{_T}wv.weight"),
    ("wo", ("dim", "q_rows"), None, "v and o", 1, f"{_HA}o_proj.weight", f"{_T}wo.weight", f"{_T}wo.weight", f"{_T}wo.weight", f"model.{_T}wo.weight"),
    ("ffn_norm", ("dim",), None, "norms", 0, f"model.{_L}post_attention_layernorm.weight", f"{_L}ffn_norm.weight", f"{_L}ffn_norm.weight", f"{_L}ffn_norm.weight", f"model.{_L}ffn_norm.weight"),
    ("w1", ("ffn_dim", "dim"), None, "feed-forward", 0, f"{_HM}gate_proj.weight", f"{_F}w1.weight", f"{_F}w1.weight", f"{_F}w1.weight", f"model.{_F}w1.weight"),
    ("w2", ("dim", "ffn_dim"), None, "feed-forward", 1, f"{_HM}down_proj.weight", f"{_F}w2.weight", f"{_F}w2.weight", f"{_F}w2.weight", f"model.{_F}w2.weight"),
    ("w3", ("ffn_dim", "dim"), None, "feed-forward", 0, f"{_HM}up_proj.weight", f"{_F}w3.weight", f"{_F}w3.weight", f"{_F}w3.weight", f"model.{_F}w3.weight"),
    ("norm", ("dim",), None, "norms", 0, "model.norm.weight", "norm.weight", "norm.weight", "norm.weight", "model.norm.weight"),
    ("output", ("vocab_size", "dim"), None, "head", 0, "lm_head.weight", "output.weight", "output.weight", "lm_head.weight", "model.output.weight"),
    # Biases exist in some Hugging Face models (attention_bias, mlp_bias); TorchTitan has none.
    ("wq.bias", ("q_rows",), "n_heads", "q and k", 0, f"{_HA}q_proj.bias", f"{_T}wq.bias", None, None, None),
    ("wk.bias", ("kv_rows",), "n_kv_heads", "q and k", 0, f"{_HA}k_proj.bias", f"{_T}wk.bias", None, None, None),
    ("wv.bias", ("kv_rows",), None, "v and o", 0, f"{_HA}v_proj.bias", f"{_T}wv.bias", None, None, None),
    ("wo.bias", ("dim",), None, "v and o", 0, f"{_HA}o_proj.bias", f"{_T}wo.bias", None, None, None),
    ("w1.bias", ("ffn_dim",), None, "feed-forward", 0, f"{_HM}gate_proj.bias", f"{_F}w1.bias", None, None, None),
    ("w2.bias", ("dim",), None, "feed-forward", 0, f"{_HM}down_proj.bias", f"{_F}w2.bias", None, None, None),
    ("w3.bias", ("ffn_dim",), None, "feed-forward", 0, f"{_HM}up_proj.bias", f"{_F}w3.bias", None, None, None),
)  # fmt: skip


@dataclass(frozen=True)
class Role:
    """One row of the table.

    Attributes:
        name: The role, by Meta's name of the tensor without its ending.
        axes: The attribute of `LlamaParams` that each axis is as long as.
        heads: The attribute of `LlamaParams` that counts the heads whose rows are re-ordered
            between RoPE layouts, or that number itself; None if rows are not re-ordered.
        kind: What it is for.
        cut: The axis along which Meta's files cut a matrix: rows (0) or columns (1).
        names: Its name in every naming, with ``N`` for the layer; None where there is none.
    """

    name: str
    axes: tuple[str, ...]
    heads: str | int | None
    kind: Kind
    cut: int
    names: dict[str, str | None]

    @property
    def per_layer(self) -> bool:
        """Whether every layer has one."""
        return "N" in (self.names["huggingface"] or "").split(".")

    @property
    def optional(self) -> bool:
        """Whether a Llama is complete without it."""
        return self.name.endswith(".bias")

    def shape(self, params: LlamaParams) -> tuple[int, ...]:
        """Its shape in a model of these parameters."""
        return tuple(getattr(params, axis) for axis in self.axes)

    def n_heads(self, params: LlamaParams) -> int | None:
        """How many heads its rows are re-ordered by in such a model; None if they are not."""
        return getattr(params, self.heads) if isinstance(self.heads, str) else self.heads

    def in_naming(self, naming: str, layer: int | None) -> str | None:
        """The tensor's name, or None where ``naming`` has no place for this role."""
        template = self.names[naming]
        return template and template.replace(".N.", f".{layer}.")


ROLES: dict[str, Role] = {
    name: Role(name, axes, heads, kind, cut, dict(zip(NAMINGS, names, strict=True)))
    for name, axes, heads, kind, cut, *names in _TABLE
}

# Tables of angles that some checkpoints store; every model computes them anew.
_COMPUTED = re.compile(
    r"(?:.*\.)?(?:rotary_emb\.(?:inv_freq|original_inv_freq|(?:cos|sin)_cached)|rope\.freqs|freqs_cis)"
)


def every(params: LlamaParams) -> Iterator[tuple[Role, int | None]]:
    """All roles that a complete Llama has, layer by layer, in the order of a forward pass."""
    yield ROLES["tok_embeddings"], None
    layered = [role for role in ROLES.values() if role.per_layer and not role.optional]
    for layer in range(params.n_layers):
        yield from ((role, layer) for role in layered)
    yield ROLES["norm"], None
    yield ROLES["output"], None


@cache
def _pattern(naming: str) -> dict[str, Role]:
    """Templates with ``N`` for the layer, to roles."""
    return {template: role for role in ROLES.values() if (template := role.names[naming])}


def identify(name: str, naming: str | None) -> tuple[Role, int | None] | None:
    """Role and layer of a tensor, or None where ``naming`` knows no such name."""
    if naming is None:
        return None
    parts = name.split(".")
    for at, part in enumerate(parts):
        # Only plain decimal layers: "01" or "²" are somebody else's names, and thousands of
        # digits are more than Python makes a number of.
        if len(part) < 10 and part.isascii() and part.isdigit() and str(int(part)) == part:
            role = _pattern(naming).get(".".join([*parts[:at], "N", *parts[at + 1 :]]))
            return (role, int(part)) if role and role.per_layer else None
    role = _pattern(naming).get(name)
    return (role, None) if role and not role.per_layer else None


def cut_axis(name: str) -> int:
    """The axis that Meta's files cut the tensor of this name of theirs along."""
    known = identify(name, "meta")
    return known[0].cut if known else 0


def is_computed(name: str) -> bool:
    """Whether the tensor holds RoPE's angles, which no target stores."""
    return _COMPUTED.fullmatch(name) is not None
