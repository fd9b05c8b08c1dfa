"""A small reference Llama: the forward pass in either RoPE layout, for verify and teaching.

One function over a dict of weights, so that one reads the whole model in a sitting and
swaps a layout by an argument. The concession: no cache, float32 throughout, every weight
in memory; for models and texts that fit.

Weights are keyed by role and layer, ``("wq", 3)`` or ``("norm", None)``: the roles of
`llamaconv.keys`, in no format's own names.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from llamaconv import rope
from llamaconv.keys import Layout
from llamaconv.params import LlamaParams

Weights = Mapping[tuple[str, int | None], Tensor]


def forward(
    weights: Weights,
    params: LlamaParams,
    tokens_BP: Tensor,
    layout: Layout,
    attention: list[Tensor] | None = None,
) -> Tensor:
    """Logits of shape ``(batch, positions, vocab_size)``, float32.

    ``layout`` chooses the rotation and has to be that of the weights' q and k rows.
    A list passed as ``attention`` collects each layer's probabilities,
    ``(batch, heads, positions, positions)``.
    """
    n_positions = tokens_BP.shape[1]
    inverse_F = rope.inverse_frequencies(params.head_dim, params.rope_theta, params.rope_scaling)
    angles_PF = rope.angles(torch.arange(n_positions), inverse_F)
    mask_PP = torch.full((n_positions, n_positions), float("-inf")).triu(1)

    def weight(role: str, layer: int | None = None) -> Tensor:
        return weights[role, layer].float()

    def norm(x: Tensor, gain: Tensor) -> Tensor:
        return F.rms_norm(x, (params.dim,), gain, params.norm_eps)

    x = F.embedding(tokens_BP, weight("tok_embeddings"))
    for layer in range(params.n_layers):
        h = norm(x, weight("attention_norm", layer))
        q = (h @ weight("wq", layer).T).unflatten(-1, (params.n_heads, params.head_dim))
        k = (h @ weight("wk", layer).T).unflatten(-1, (params.n_kv_heads, params.head_dim))
        v = (h @ weight("wv", layer).T).unflatten(-1, (params.n_kv_heads, params.head_dim))
        q, k = rope.rotate(q, angles_PF, layout), rope.rotate(k, angles_PF, layout)
        k, v = (t.repeat_interleave(params.n_heads // params.n_kv_heads, dim=-2) for t in (k, v))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if attention is not None:
            attention.append((q @ k.mT / params.head_dim**0.5 + mask_PP).softmax(-1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + mixed.transpose(1, 2).flatten(-2) @ weight("wo", layer).T
        h = norm(x, weight("ffn_norm", layer))
        gate, up = h @ weight("w1", layer).T, h @ weight("w3", layer).T
        x = x + (F.silu(gate) * up) @ weight("w2", layer).T
    return norm(x, weight("norm")) @ weight("output").T


def loss(logits_BPV: Tensor, tokens_BP: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, in nats per token."""
    return F.cross_entropy(logits_BPV[:, :-1].flatten(0, 1), tokens_BP[:, 1:].flatten())
