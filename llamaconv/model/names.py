"""ONE table: what each tensor of a Llama is called in every naming, and its shape.

One row per role, one column per naming. Everything that renames, checks a shape, or asks whether
rows belong to heads reads this table. ``N`` stands for the layer, None for no such tensor.

TorchTitan's names are from its released wheels: ``titan-0.2`` covers 0.1.0 to 0.2.2, ``titan-0.3``
is 0.3.0. ``titan-2024`` has ``model.`` in front, as its conversion script of 2024 wrote.
``torchtune`` is read only: its distributed checkpoints have it.

``titan-main`` is pytorch/torchtitan's main branch since 2026-09-21 (#4808, #4815), which no release
has yet. It stores q, k and v of a layer as one tensor, and w1 and w3 as another: `FUSED`. There, a
role's name is that of the tensor that holds it, with the role in brackets; `whole` takes that off.

Wrappers put further parts into names (`unwrapped`): a checkpoint keeps the stored name, and
`identify` looks past them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

from llamaconv.model.families import EXTRA_ROLES, FAMILIES
from llamaconv.model.families import Layout as Layout
from llamaconv.model.params import LlamaParams

Kind = Literal["embedding", "q and k", "v and o", "feed-forward", "norms", "head"]
"""What a role is for; the groups that tables and pictures show."""

GENERATIONS = ("titan-0.3", "titan-main", "titan-0.2", "titan-2024")
"""Names that fit several generations count as the first of them."""

NAMINGS = ("huggingface", "meta", "titan-0.2", "titan-0.3", "titan-main", "titan-2024", "torchtune")

_L = "layers.N."
_T = f"{_L}attention."
_Q = f"{_T}qkv_linear."
_F = f"{_L}feed_forward."
_U = f"{_L}attn."
_HA, _HM = f"model.{_L}self_attn.", f"model.{_L}mlp."

# role, shape, heads, kind, cut, then the name in each of NAMINGS
_TABLE: tuple[
    tuple[str, tuple[str, ...], str | int | None, Kind, int, *tuple[str | None, ...]], ...
] = (
    ("tok_embeddings", ("vocab_size", "dim"), None, "embedding", 0, "model.embed_tokens.weight", "tok_embeddings.weight", "tok_embeddings.weight", "tok_embeddings.weight", "tok_embeddings.weight", "model.tok_embeddings.weight", "tok_embeddings.weight"),
    ("attention_norm", ("dim",), None, "norms", 0, f"model.{_L}input_layernorm.weight", f"{_L}attention_norm.weight", f"{_L}attention_norm.weight", f"{_L}attention_norm.weight", f"{_L}attention_norm.weight", f"model.{_L}attention_norm.weight", f"{_L}sa_norm.scale"),
    ("wq", ("q_rows", "dim"), "n_heads", "q and k", 0, f"{_HA}q_proj.weight", f"{_T}wq.weight", f"{_T}wq.weight", f"{_Q}wq.weight", f"{_Q}wqkv.weight[wq]", f"model.{_T}wq.weight", f"{_U}q_proj.weight"),
    ("wk", ("kv_rows", "dim"), "n_kv_heads", "q and k", 0, f"{_HA}k_proj.weight", f"{_T}wk.weight", f"{_T}wk.weight", f"{_Q}wk.weight", f"{_Q}wqkv.weight[wk]", f"model.{_T}wk.weight", f"{_U}k_proj.weight"),
    ("wv", ("kv_rows", "dim"), None, "v and o", 0, f"{_HA}v_proj.weight", f"{_T}wv.weight", f"{_T}wv.weight", f"{_Q}wv.weight", f"{_Q}wqkv.weight[wv]", f"model.{_T}wv.weight", f"{_U}v_proj.weight"),
    # Norms within each head of q and k (Qwen 3). Their elements go with the rows of a head.
    ("q_norm", ("head_dim",), 1, "norms", 0, f"{_HA}q_norm.weight", None, None, f"{_T}q_norm.weight", f"{_T}q_norm.weight", None, None),
    ("k_norm", ("head_dim",), 1, "norms", 0, f"{_HA}k_norm.weight", None, None, f"{_T}k_norm.weight", f"{_T}k_norm.weight", None, None),
    ("wo", ("dim", "q_rows"), None, "v and o", 1, f"{_HA}o_proj.weight", f"{_T}wo.weight", f"{_T}wo.weight", f"{_T}wo.weight", f"{_T}wo.weight", f"model.{_T}wo.weight", f"{_U}output_proj.weight"),
    ("ffn_norm", ("dim",), None, "norms", 0, f"model.{_L}post_attention_layernorm.weight", f"{_L}ffn_norm.weight", f"{_L}ffn_norm.weight", f"{_L}ffn_norm.weight", f"{_L}ffn_norm.weight", f"model.{_L}ffn_norm.weight", f"{_L}mlp_norm.scale"),
    ("w1", ("ffn_dim", "dim"), None, "feed-forward", 0, f"{_HM}gate_proj.weight", f"{_F}w1.weight", f"{_F}w1.weight", f"{_F}w1.weight", f"{_F}w13.weight[w1]", f"model.{_F}w1.weight", f"{_L}mlp.w1.weight"),
    ("w2", ("dim", "ffn_dim"), None, "feed-forward", 1, f"{_HM}down_proj.weight", f"{_F}w2.weight", f"{_F}w2.weight", f"{_F}w2.weight", f"{_F}w2.weight", f"model.{_F}w2.weight", f"{_L}mlp.w2.weight"),
    ("w3", ("ffn_dim", "dim"), None, "feed-forward", 0, f"{_HM}up_proj.weight", f"{_F}w3.weight", f"{_F}w3.weight", f"{_F}w3.weight", f"{_F}w13.weight[w3]", f"model.{_F}w3.weight", f"{_L}mlp.w3.weight"),
    ("norm", ("dim",), None, "norms", 0, "model.norm.weight", "norm.weight", "norm.weight", "norm.weight", "norm.weight", "model.norm.weight", "norm.scale"),
    ("output", ("vocab_size", "dim"), None, "head", 0, "lm_head.weight", "output.weight", "output.weight", "lm_head.weight", "lm_head.weight", "model.output.weight", "output.weight"),
    # Biases: those of Qwen 2, and of Llamas with attention_bias or mlp_bias.
    ("wq.bias", ("q_rows",), "n_heads", "q and k", 0, f"{_HA}q_proj.bias", f"{_T}wq.bias", None, f"{_Q}wq.bias", None, None, None),
    ("wk.bias", ("kv_rows",), "n_kv_heads", "q and k", 0, f"{_HA}k_proj.bias", f"{_T}wk.bias", None, f"{_Q}wk.bias", None, None, None),
    ("wv.bias", ("kv_rows",), None, "v and o", 0, f"{_HA}v_proj.bias", f"{_T}wv.bias", None, f"{_Q}wv.bias", None, None, None),
    ("wo.bias", ("dim",), None, "v and o", 0, f"{_HA}o_proj.bias", f"{_T}wo.bias", None, f"{_T}wo.bias", None, None, None),
    ("w1.bias", ("ffn_dim",), None, "feed-forward", 0, f"{_HM}gate_proj.bias", f"{_F}w1.bias", None, f"{_F}w1.bias", None, None, None),
    ("w2.bias", ("dim",), None, "feed-forward", 0, f"{_HM}down_proj.bias", f"{_F}w2.bias", None, f"{_F}w2.bias", None, None, None),
    ("w3.bias", ("ffn_dim",), None, "feed-forward", 0, f"{_HM}up_proj.bias", f"{_F}w3.bias", None, f"{_F}w3.bias", None, None, None),
)  # fmt: skip

# What titan-main stores as one tensor: its name for the role, shape, kind, the roles in it, the name.
# A row of wqkv belongs to q, k or v; pictures show it with the first.
_FUSED: tuple[tuple[str, tuple[str, ...], Kind, tuple[str, ...], str], ...] = (
    ("wqkv", ("qkv_rows", "dim"), "q and k", ("wq", "wk", "wv"), f"{_Q}wqkv.weight"),
    ("w13", ("2", "ffn_dim", "dim"), "feed-forward", ("w1", "w3"), f"{_F}w13.weight"),
)


@dataclass(frozen=True)
class Role:
    """One row of the table.

    Attributes:
        name: The role, by Meta's name of the tensor without its ending.
        axes: The attribute of `LlamaParams` that each axis is as long as, or that number itself.
        heads: The attribute of `LlamaParams` that counts the heads whose rows are reordered
            between RoPE layouts, or that number itself; None if rows are not reordered.
        kind: What it is for.
        cut: The axis along which Meta's files cut a matrix: rows (0) or columns (1).
        names: Its name in every naming, with ``N`` for the layer; None if there is no such tensor.
        parts: The roles that it consists of, for the tensors of `FUSED`.
    """

    name: str
    axes: tuple[str, ...]
    heads: str | int | None
    kind: Kind
    cut: int
    names: dict[str, str | None]
    parts: tuple[str, ...] = ()

    @property
    def per_layer(self) -> bool:
        """Whether every layer has one."""
        return any("N" in name.split(".") for name in self.names.values() if name)

    @property
    def optional(self) -> bool:
        """Whether a model of some family is complete without it."""
        return self.name in EXTRA_ROLES

    @property
    def is_bias(self) -> bool:
        """Whether it is added to the product with a matrix."""
        return self.name.endswith(".bias")

    def shape(self, params: LlamaParams) -> tuple[int, ...]:
        """Return its shape in a model of these parameters."""
        return tuple(int(a) if a.isdigit() else getattr(params, a) for a in self.axes)

    def n_heads(self, params: LlamaParams) -> int | None:
        """Return how many heads have their rows reordered; None if no rows are reordered."""
        return getattr(params, self.heads) if isinstance(self.heads, str) else self.heads

    def in_naming(self, naming: str, layer: int | None) -> str | None:
        """Return the tensor's name, or None if ``naming`` has no such tensor."""
        template = self.names[naming]
        return template and template.replace(".N.", f".{layer}.")

    def in_optimizer(self, generation: str, layer: int | None) -> str | None:
        """Return the name of the parameter in an optimizer of ``generation``."""
        fused = (FUSED[name] for name in FUSED_IN_OPTIMIZER[generation])
        is_part = any(self.name in one.parts for one in fused)
        return self.in_naming("titan-main" if is_part else generation, layer)


ROLES: dict[str, Role] = {
    name: Role(name, axes, heads, kind, cut, dict(zip(NAMINGS, names, strict=True)))
    for name, axes, heads, kind, cut, *names in _TABLE
}

FUSED: dict[str, Role] = {
    name: Role(name, axes, None, kind, 0, {**dict.fromkeys(NAMINGS), "titan-main": stored}, parts)
    for name, axes, kind, parts, stored in _FUSED
}
"""The tensors that hold several roles. They are no roles of their own: a plan moves their parts."""

ROLE_ORDER: dict[str, float] = {role: at for at, role in enumerate(ROLES)}
"""The place of each role in a forward pass; a fused tensor comes before its parts."""
ROLE_ORDER |= {fused.name: ROLE_ORDER[fused.parts[0]] - 0.5 for fused in FUSED.values()}

OPTIMIZER = "optimizer"
"""The key under which TorchTitan saves an optimizer."""

FUSED_IN_OPTIMIZER = {
    "titan-0.2": (),
    "titan-0.3": ("wqkv",),
    "titan-main": ("wqkv", "w13"),
}
"""Which tensors of `FUSED` are one parameter for the optimizer of a generation.

That of 0.3.0 is keyed by the parameters of the stock flavours, which fuse q, k and v, while hooks take
them apart for the model's own names. Generations that are not here save no optimizer that can be moved.
"""

_PART = re.compile(rf"(.+\.(?:{'|'.join(FUSED)})\.weight(?:\.\w+)?)\[\w+\]")

# What some checkpoints store and no model needs: the ending of a name, and why it is left out.
_NEEDLESS = tuple(
    (re.compile(rf"(?:.*\.)?(?:{ending})"), reason)
    for ending, reason in (
        (
            r"rotary_emb\.(?:inv_freq|original_inv_freq|(?:cos|sin)_cached)|rope\.freqs|freqs_cis",
            "RoPE's angles: every model computes them itself",
        ),
        (r"_extra_state", "bookkeeping of TransformerEngine, which holds no weights"),
    )
)

# Parts that FSDP, torch.compile, activation checkpointing and other wrappers put into names.
_WRAPPERS = frozenset(
    {
        "_checkpoint_wrapped_module",
        "_forward_module",
        "_fpw_module",
        "_fsdp_wrapped_module",
        "_orig_mod",
        "module",
    }
)
# Keys under which trainers save a model; they are in front of all of its names.
_KEYS_OF_MODELS = re.compile(
    r"actor|app|app_state|base_model|generator|llm|model|model_state|model_state_dict|net|network"
    r"|policy|pretrained_model|state|state_dict|student|weights"
)
# Keys under which they save everything else, with or without endings such as ``_state``.
_TRAINER_STATE = re.compile(
    r"(?:args|algorithms|callbacks|cfg|config|consumed_tokens|consumed_train_samples|cuda_rng"
    r"|data_loader|dataloader|dataset|ema|ema_model|epoch|epochs|epochs_run|eval_metrics"
    r"|extra_states?|ft_dataloader|global_step|grad_scaler|hparams|hyper_parameters|integrations"
    r"|iter|iter_num|iteration|job|loops|loss|loss_scaler|lr_scheduler|lr_schedulers"
    r"|max_steps|max_steps_per_epoch|meta|metadata|metrics|model_ema|num_epochs|num_steps"
    r"|numpy_rng|opt|optim|optimizer|optimizers|param_groups|progress"
    r"|pytorch-lightning_version|rank_zero_seed|random|rng|run_name|sampler|scaler"
    r"|scheduler|schedulers|seed|step|step_count|steps|steps_run|timestamp|tokens"
    r"|torch_rng|total_epochs|total_steps|total_tokens|train|train_dataloader"
    r"|train_metrics|trainer|val_dataloader|version|wandb"
    r")(?:_states?|_dict|_\d+)*"
)
_OF_AN_OPTIMIZER = re.compile(r".*\.(?:exp_avg|exp_avg_sq|max_exp_avg_sqs?|momentum_buffer)")


def every_role(params: LlamaParams) -> Iterator[tuple[Role, int | None]]:
    """Yield role and layer of each tensor of a complete model, in the order of a forward pass."""
    yield ROLES["tok_embeddings"], None
    needed = FAMILIES[params.family].roles
    layered = [
        role
        for role in ROLES.values()
        if role.per_layer and (role.name in needed or not role.optional)
    ]
    for layer in range(params.n_layers):
        yield from ((role, layer) for role in layered)
    yield ROLES["norm"], None
    yield ROLES["output"], None


@cache
def _pattern(naming: str) -> dict[str, Role]:
    """Return the role of each name, with ``N`` for the layer."""
    every = (*ROLES.values(), *FUSED.values())
    return {template: role for role in every if (template := role.names[naming])}


def whole(name: str) -> str:
    """Return the name of the stored tensor: without the role in brackets of a part of one."""
    match = _PART.fullmatch(name)
    return match[1] if match else name


def state_name(parameter: str, state: str) -> str:
    """Return the name under which TorchTitan saves one of an optimizer's tensors.

    Args:
        parameter: The parameter's name, with the role in brackets for a part of a fused one.
        state: Which tensor it is, such as ``exp_avg``.
    """
    stored = whole(parameter)
    return f"{OPTIMIZER}.state.{stored}.{state}{parameter[len(stored) :]}"


def identify(name: str, naming: str | None) -> tuple[Role, int | None] | None:
    """Return role and layer of a tensor, or None if ``naming`` has no such name.

    The role may be one of `FUSED`.
    """
    return unwrapped(name, naming)[0]


def unwrapped(
    name: str, naming: str | None
) -> tuple[tuple[Role, int | None] | None, tuple[str, ...]]:
    """Identify a tensor whose name may have wrappers.

    Returns:
        Its role and layer, or None; and the parts of its name that wrappers added.
    """
    if naming is None:
        return None, ()
    for bare, added in readings(name):
        if known := _identify(bare, naming):
            return known, added
    return None, ()


def bare_name(name: str, naming: str | None) -> str:
    """Return the name without the parts that wrappers added, or ``name`` if it is unknown."""
    known = identify(name, naming)
    return (naming and known and known[0].in_naming(naming, known[1])) or name


def readings(name: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield ``name``, then what it may be without wrappers, each with the parts taken out."""
    yield name, ()
    parts = name.split(".")
    added = [part for part in parts if part in _WRAPPERS]
    if added:
        parts = [part for part in parts if part not in _WRAPPERS]
        yield ".".join(parts), tuple(added)
    while len(parts) > 1 and _KEYS_OF_MODELS.fullmatch(parts[0]):
        added.append(parts.pop(0))
        yield ".".join(parts), tuple(added)
    if parts[0] == "transformer":  # transformers' LlamaForQuestionAnswering
        yield ".".join(["model", *parts[1:]]), (*added, parts[0])


def _identify(name: str, naming: str) -> tuple[Role, int | None] | None:
    parts = name.split(".")
    for at, part in enumerate(parts):
        # Only plain decimal layers: "01" and "²" are other names, and Python converts no text of
        # thousands of digits to a number.
        if len(part) < 10 and part.isascii() and part.isdigit() and str(int(part)) == part:
            role = _pattern(naming).get(".".join([*parts[:at], "N", *parts[at + 1 :]]))
            return (role, int(part)) if role and role.per_layer else None
    role = _pattern(naming).get(name)
    return (role, None) if role and not role.per_layer else None


def best_naming(names: Collection[str], namings: Iterable[str]) -> str | None:
    """Return the naming that most names fit, with the fewest wrappers; None if none fits any."""
    best, most = None, (0, 0)
    for naming in namings:
        found = [added for known, added in (unwrapped(name, naming) for name in names) if known]
        fit = len(found), -sum(map(len, found))
        if found and (best is None or fit > most):
            best, most = naming, fit
    return best


def trainer_state(name: str) -> str:
    """Return the key under which a trainer saved ``name`` outside its model, or ""."""
    for bare, _ in readings(name):
        if _TRAINER_STATE.fullmatch(key := bare.split(".", maxsplit=1)[0]):
            return key
    return name.split(".", maxsplit=1)[0] if _OF_AN_OPTIMIZER.fullmatch(name) else ""


def cut_axis(name: str) -> int:
    """Return the axis along which Meta's files cut the tensor of this name."""
    known = identify(name, "meta")
    return known[0].cut if known else 0


def why_needless(name: str) -> str:
    """Return why no target stores the tensor, such as RoPE's angles; "" if it may be a weight."""
    return next((reason for ending, reason in _NEEDLESS if ending.fullmatch(name)), "")
