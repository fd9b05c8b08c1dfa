"""The two layouts of q and k rows, and the rotation that belongs to each.

RoPE turns pairs of numbers of a head by an angle that grows with the position. Which
two numbers make a pair is a convention, and there are two:

- ``interleaved`` (Meta, TorchTitan): row 2i is paired with row 2i + 1;
- ``half_split`` (Hugging Face): row i is paired with row i + head_dim / 2.

A matrix in one layout is the other with the rows of each head re-ordered; together with
its own rotation either gives the same attention scores. With the other's rotation the
scores are right at distance 0 only.

Limit: whole heads only, one head per ``head_dim`` consecutive rows. Everything here is a
pure function on tensors; nothing knows files or models.

Names of tensors end in their axes: H heads, D head_dim, F = D/2 frequencies, P positions,
C columns.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llamaconv.keys import Layout

if TYPE_CHECKING:
    from llamaconv.params import RopeScaling


def half_split_to_interleaved(rows: Tensor, n_heads: int) -> Tensor:
    """Re-order the rows of each head: row i becomes 2i, row i + head_dim/2 becomes 2i + 1.

    ``rows`` is a weight of shape ``(n_heads * head_dim, columns)`` or a bias of shape
    ``(n_heads * head_dim,)``; ``n_heads`` counts the heads of *this* tensor, so the
    kv heads for k. Returns a new tensor of the same shape and dtype.

    Raises ``ValueError`` where the rows are not whole heads of an even size.
    """
    return relayout_view(rows, n_heads, "half_split", "interleaved").reshape(rows.shape)


def interleaved_to_half_split(rows: Tensor, n_heads: int) -> Tensor:
    """The way back: row 2i becomes i, row 2i + 1 becomes i + head_dim/2.

    Shapes and errors as in `half_split_to_interleaved`.
    """
    return relayout_view(rows, n_heads, "interleaved", "half_split").reshape(rows.shape)


def relayout(rows: Tensor, n_heads: int, source: Layout, target: Layout) -> Tensor:
    """``rows`` (see `half_split_to_interleaved`) from the layout ``source`` to ``target``."""
    return relayout_view(rows, n_heads, source, target).reshape(rows.shape)


def relayout_view(rows: Tensor, n_heads: int, source: Layout, target: Layout) -> Tensor:
    """`relayout` without a copy: a view of shape ``(H, D/2, 2, C)`` or ``(H, 2, D/2, C)``.

    Its first three axes, flattened, are the rows of the layout ``target``.
    """
    half = _half_head(rows, n_heads)
    # Of the two numbers of a pair, half_split counts the member first, interleaved the pair.
    axes = (2, half) if source == "half_split" else (half, 2)
    heads = rows.reshape(n_heads, *axes, *rows.shape[1:])
    return heads if source == target else heads.transpose(1, 2)


def _half_head(rows: Tensor, n_heads: int) -> int:
    if n_heads < 1 or rows.shape[0] % (2 * n_heads):
        raise ValueError(
            f"{rows.shape[0]} rows are not {n_heads} heads of an even size; "
            "pass the number of heads of this tensor (n_kv_heads for k)"
        )
    return rows.shape[0] // (2 * n_heads)


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> Tensor:
    """Radians per position of each pair, shape ``(head_dim / 2,)``, float32.

    ``theta`` is RoPE's base (``rope_theta``). With ``scaling``, Llama 3.1's rule: pairs
    whose wavelength is longer than ``original_max_position / low_freq_factor`` turn
    ``factor`` times slower, those shorter than ``original_max_position /
    high_freq_factor`` stay, the ones between are blended (``apply_scaling`` in Meta's
    llama-models; ``_compute_llama3_parameters`` in transformers).
    """
    exponents_F = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    inverse_F = 1.0 / (theta**exponents_F)
    if scaling is None:
        return inverse_F
    wavelength_F = 2 * math.pi / inverse_F
    turns_F = scaling.original_max_position / wavelength_F
    blend_F = (turns_F - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blend_F = blend_F.clamp(0.0, 1.0)
    return (1 - blend_F) * inverse_F / scaling.factor + blend_F * inverse_F


def angles(positions_P: Tensor, inverse_F: Tensor) -> Tensor:
    """How far each pair has turned at each position, radians, shape ``(P, F)``."""
    return torch.outer(positions_P.float(), inverse_F)


def rotate_interleaved(x: Tensor, angles_PF: Tensor) -> Tensor:
    """Turn the pairs (2i, 2i + 1) of ``x``, shape ``(..., P, H, D)``, as complex numbers.

    The rotation of Meta's reference and of TorchTitan. Same shape and dtype as ``x``.
    """
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2).contiguous())
    turn_P1F = torch.polar(torch.ones_like(angles_PF), angles_PF).unsqueeze(-2)
    return torch.view_as_real(pairs * turn_P1F).flatten(-2).to(x.dtype)


def rotate_half_split(x: Tensor, angles_PF: Tensor) -> Tensor:
    """Turn the pairs (i, i + D/2) of ``x``, shape ``(..., P, H, D)``, by cosine and sine.

    The rotate-half form of transformers. Same shape and dtype as ``x``.
    """
    cos = torch.cat([angles_PF, angles_PF], -1).cos().unsqueeze(-2)
    sin = torch.cat([angles_PF, angles_PF], -1).sin().unsqueeze(-2)
    first, second = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)


def rotate(x: Tensor, angles_PF: Tensor, layout: Layout) -> Tensor:
    """The rotation that belongs to ``layout``, on ``x`` of shape ``(..., P, H, D)``."""
    if layout == "interleaved":
        return rotate_interleaved(x, angles_PF)
    return rotate_half_split(x, angles_PF)


def scores(q_PHD: Tensor, k_PGD: Tensor, angles_PF: Tensor | None, layout: Layout) -> Tensor:
    """Attention scores before the softmax, shape ``(H, P, P)``, row = query position.

    ``H`` query heads share ``G`` kv heads, ``H / G`` neighbours each. ``angles_PF`` of
    None leaves the rotation out.
    """
    if angles_PF is not None:
        q_PHD = rotate(q_PHD, angles_PF, layout)
        k_PGD = rotate(k_PGD, angles_PF, layout)
    k_PHD = k_PGD.repeat_interleave(q_PHD.shape[1] // k_PGD.shape[1], dim=1)
    return torch.einsum("phd,shd->hps", q_PHD, k_PHD) / math.sqrt(q_PHD.shape[-1])
