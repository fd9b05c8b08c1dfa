"""A small reference Llama: the forward pass in either RoPE layout, for verify and teaching.

Short functions over a mapping of weights, so that the whole model can be read in a sitting, and an
argument swaps the layout. The weights of a family decide: a bias, or a norm within the heads of q
and k, is applied if it is there. The concession: float32 throughout, and all logits at once.
`forward` asks for the weights of one layer at a time, so a mapping may read them when asked.

Names of tensors end in their axes: B texts, P positions, C width of the model, V tokens of the
vocabulary, F pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from llamaconv.model import rope
from llamaconv.model.names import ROLES, Layout
from llamaconv.model.params import LlamaParams

Weights = Mapping[tuple[str, int | None], Tensor]
"""Weights by role (see `llamaconv.model.names`) and layer: ``("wq", 3)``, ``("norm", None)``."""

LAYER_ROLES = tuple(role.name for role in ROLES.values() if role.per_layer)
"""The roles of the weights of one layer. `block` does without those that no model has to have."""


def forward(
    weights: Weights,
    params: LlamaParams,
    tokens_BP: Tensor,
    layout: Layout,
    attention: list[Tensor] | None = None,
) -> Tensor:
    """Compute the logits of the next token at each position.

    Args:
        weights: Every weight.
        params: The model's parameters.
        tokens_BP: Token numbers.
        layout: Which rotation to use; must be the layout of the weights' q and k rows.
        attention: A list that gets each layer's probabilities, shape ``(B, heads, P, P)``.

    Returns:
        Shape ``(B, P, V)``, float32.
    """
    angles_PF = angles(params, tokens_BP.shape[1])

    def rotate(x_BPHD: Tensor, _role: str) -> Tensor:
        return rope.rotate(x_BPHD, angles_PF, layout)

    x = F.embedding(tokens_BP, weights["tok_embeddings", None].float())
    for layer in range(params.n_layers):
        of_layer = {role: weights[role, layer].float() for role in layer_roles(weights, layer)}
        x = block(of_layer, params, x, rotate, attention)
    return norm(x, weights["norm", None].float(), params) @ weights["output", None].float().T


def layer_roles(places: Collection[tuple[str, int | None]], layer: int) -> list[str]:
    """Return the roles that a layer has among ``places``, in the order of a forward pass."""
    return [role for role in LAYER_ROLES if (role, layer) in places]


def angles(params: LlamaParams, n_positions: int, first: int = 0) -> Tensor:
    """Return the angle of each pair at ``n_positions`` positions from ``first`` on (P, F)."""
    inverse_F = rope.inverse_frequencies(params.head_dim, params.rope_theta, params.rope_scaling)
    return rope.angles(torch.arange(first, first + n_positions), inverse_F)


def norm(x_BPC: Tensor, gain_C: Tensor, params: LlamaParams) -> Tensor:
    """Return ``x_BPC`` normalized along its last axis, times ``gain_C``."""
    return F.rms_norm(x_BPC, gain_C.shape, gain_C, params.norm_eps)


def linear(x_BPC: Tensor, weights: Mapping[str, Tensor], role: str) -> Tensor:
    """Return the product with a matrix, and its bias added if there is one."""
    return with_bias(x_BPC @ weights[role].T, weights, role)


def with_bias(product: Tensor, weights: Mapping[str, Tensor], role: str) -> Tensor:
    """Return ``product`` with the bias of a role added, if there is one."""
    bias = weights.get(f"{role}.bias")
    return product if bias is None else product + bias


def heads(product: Tensor, weights: Mapping[str, Tensor], role: str, params: LlamaParams) -> Tensor:
    """Return the heads of "wq", "wk" or "wv", as they are before the rotation.

    Args:
        product: The product of the input with the matrix, shape ``(..., heads * D)``.
        weights: The bias of the role (``wq.bias``) and the norm within its heads (``q_norm``), if
            there are such; other weights are not needed.
        role: The role of the matrix.
        params: The model's parameters.

    Returns:
        Shape ``(..., heads, D)``.
    """
    split = with_bias(product, weights, role).unflatten(-1, (-1, params.head_dim))
    gain = weights.get(f"{role[1]}_norm")
    return split if gain is None else norm(split, gain, params)


def block(
    weights: Mapping[str, Tensor],
    params: LlamaParams,
    x: Tensor,
    rotate: Callable[[Tensor, str], Tensor],
    attention: list[Tensor] | None = None,
    past: list[Tensor] | None = None,
) -> Tensor:
    """Compute one layer.

    Args:
        weights: The weights of the layer, by role (`LAYER_ROLES`), float32.
        params: The model's parameters.
        x: The output of the layer before, shape ``(B, P, C)``.
        rotate: Rotates the numbers ``(B, P, heads, D)`` of "wq" or "wk".
        attention: As for `forward`, without ``past``.
        past: Empty, or k and v of earlier positions; then ``x`` has one position. Gets those of
            ``x`` too.

    Returns:
        Shape ``(B, P, C)``.
    """
    h = norm(x, weights["attention_norm"], params)
    q, k, v = (heads(h @ weights[role].T, weights, role, params) for role in ("wq", "wk", "wv"))
    q, k = rotate(q, "wq"), rotate(k, "wk")
    if past is not None:
        if past:
            k, v = torch.cat([past[0], k], 1), torch.cat([past[1], v], 1)
        past[:] = k, v
    k, v = (t.repeat_interleave(params.n_heads // params.n_kv_heads, dim=-2) for t in (k, v))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if attention is not None:
        mask_PP = torch.full((q.shape[2], q.shape[2]), float("-inf")).triu(1)
        attention.append((q @ k.mT / params.head_dim**0.5 + mask_PP).softmax(-1))
    # A single position sees all others, so it needs no mask.
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)
    x = x + linear(mixed.transpose(1, 2).flatten(-2), weights, "wo")
    h = norm(x, weights["ffn_norm"], params)
    gate, up = linear(h, weights, "w1"), linear(h, weights, "w3")
    return x + linear(F.silu(gate) * up, weights, "w2")


def loss(logits_BPV: Tensor, tokens_BP: Tensor) -> Tensor:
    """Return the mean cross-entropy of the next token, in nats per token."""
    return F.cross_entropy(logits_BPV[:, :-1].flatten(0, 1), tokens_BP[:, 1:].flatten())
