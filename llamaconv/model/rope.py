"""The two layouts of q and k rows, and the rotation that belongs to each.

RoPE rotates pairs of numbers of a head by an angle that grows with the position. Which
two numbers form a pair is a convention, and there are two:

- ``interleaved`` (Meta, TorchTitan): row 2i is paired with row 2i + 1;
- ``half_split`` (Hugging Face): row i is paired with row i + head_dim / 2.

A matrix in one layout is the other with the rows of each head reordered. Each layout with its
own rotation gives the same attention scores. With the other's rotation the scores are right
only at distance 0.

Limit: whole heads only, each of ``head_dim`` consecutive rows. Everything here is a pure
function on tensors; nothing knows files or models.

Names of tensors end in their axes: H query heads, G kv heads, D head_dim, F = D/2 pairs, P
positions, C columns.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llamaconv.model.names import Layout

if TYPE_CHECKING:
    from llamaconv.model.params import RopeScaling


def half_split_to_interleaved(rows: Tensor, n_heads: int) -> Tensor:
    """Reorder the rows of each head: row i becomes 2i, row i + head_dim/2 becomes 2i + 1.

    Args:
        rows: A weight of shape ``(n_heads * head_dim, columns)``, or a bias of shape
            ``(n_heads * head_dim,)``.
        n_heads: Number of heads of *this* tensor, so of kv heads for k.

    Returns:
        A new tensor of the same shape and dtype.

    Raises:
        ValueError: The rows are not whole heads of an even size.
    """
    return relayout_view(rows, n_heads, "half_split", "interleaved").reshape(rows.shape)


def interleaved_to_half_split(rows: Tensor, n_heads: int) -> Tensor:
    """Reorder the rows of each head: row 2i becomes i, row 2i + 1 becomes i + head_dim/2.

    The inverse of `half_split_to_interleaved`, with the same shapes and errors.
    """
    return relayout_view(rows, n_heads, "interleaved", "half_split").reshape(rows.shape)


def relayout(rows: Tensor, n_heads: int, source: Layout, target: Layout) -> Tensor:
    """Reorder rows (see `half_split_to_interleaved`) from the layout ``source`` to ``target``."""
    return relayout_view(rows, n_heads, source, target).reshape(rows.shape)


def relayout_view(rows: Tensor, n_heads: int, source: Layout, target: Layout) -> Tensor:
    """Do what `relayout` does without a copy.

    Returns:
        A view of shape ``(H, D/2, 2, C)`` or ``(H, 2, D/2, C)``. Its first three axes, flattened,
        are the rows in the layout ``target``.
    """
    half = _half_head(rows, n_heads)
    # The axes of a head: half_split has (member of the pair, pair), interleaved (pair, member).
    axes = (2, half) if source == "half_split" else (half, 2)
    heads = rows.reshape(n_heads, *axes, *rows.shape[1:])
    return heads if source == target else heads.transpose(1, 2)


def _half_head(rows: Tensor, n_heads: int) -> int:
    if n_heads < 1 or rows.shape[0] % (2 * n_heads):
        raise ValueError(
            f"{rows.shape[0]} rows cannot be cut into {n_heads} heads of an even size; pass the "
            "number of heads of this tensor (n_kv_heads for k)"
        )
    return rows.shape[0] // (2 * n_heads)


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> Tensor:
    """Return by how many radians per position each pair rotates.

    With ``scaling``, Llama 3.1's rule applies: pairs whose wavelength is longer than
    ``original_max_position / low_freq_factor`` rotate ``factor`` times slower, pairs whose
    wavelength is shorter than ``original_max_position / high_freq_factor`` keep their speed, and
    those between are blended (``apply_scaling`` in Meta's llama-models;
    ``_compute_llama3_parameters`` in transformers).

    Args:
        head_dim: Numbers per head.
        theta: RoPE's base (``rope_theta``).
        scaling: Scaling of the frequencies, or None.

    Returns:
        Shape ``(F,)``, float32.
    """
    exponents_F = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    inverse_F = 1.0 / (theta**exponents_F)
    if scaling is None:
        return inverse_F
    wavelength_F = 2 * math.pi / inverse_F
    rotations_F = scaling.original_max_position / wavelength_F
    blend_F = (rotations_F - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blend_F = blend_F.clamp(0.0, 1.0)
    return (1 - blend_F) * inverse_F / scaling.factor + blend_F * inverse_F


def angles(positions_P: Tensor, inverse_F: Tensor) -> Tensor:
    """Return by how many radians each pair is rotated at each position, shape ``(P, F)``."""
    return torch.outer(positions_P.float(), inverse_F)


def rotate_interleaved(x: Tensor, angles_PF: Tensor) -> Tensor:
    """Rotate the pairs (2i, 2i + 1) of ``x``, shape ``(..., P, H, D)``, as complex numbers.

    The rotation of Meta's reference and of TorchTitan. Same shape and dtype as ``x``.
    """
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2).contiguous())
    rotation_P1F = torch.polar(torch.ones_like(angles_PF), angles_PF).unsqueeze(-2)
    return torch.view_as_real(pairs * rotation_P1F).flatten(-2).to(x.dtype)


def rotate_half_split(x: Tensor, angles_PF: Tensor) -> Tensor:
    """Rotate the pairs (i, i + D/2) of ``x``, shape ``(..., P, H, D)``, by cosine and sine.

    The rotate-half form of transformers. Same shape and dtype as ``x``.
    """
    cos = torch.cat([angles_PF, angles_PF], -1).cos().unsqueeze(-2)
    sin = torch.cat([angles_PF, angles_PF], -1).sin().unsqueeze(-2)
    first, second = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)


def rotate(x: Tensor, angles_PF: Tensor, layout: Layout) -> Tensor:
    """Rotate ``x``, shape ``(..., P, H, D)``, as belongs to ``layout``."""
    if layout == "interleaved":
        return rotate_interleaved(x, angles_PF)
    return rotate_half_split(x, angles_PF)


def scores(q_PHD: Tensor, k_PGD: Tensor, angles_PF: Tensor | None, layout: Layout) -> Tensor:
    """Return attention scores before the softmax.

    Args:
        q_PHD: Queries of H heads.
        k_PGD: Keys of G heads; each serves ``H / G`` neighbouring query heads.
        angles_PF: Angles of the rotation; None leaves it out.
        layout: Which numbers form a pair.

    Returns:
        Shape ``(H, P, P)``: head, position of the query, position of the key.
    """
    if angles_PF is not None:
        q_PHD = rotate(q_PHD, angles_PF, layout)
        k_PGD = rotate(k_PGD, angles_PF, layout)
    k_PHD = k_PGD.repeat_interleave(q_PHD.shape[1] // k_PGD.shape[1], dim=1)
    return torch.einsum("phd,shd->hps", q_PHD, k_PHD) / math.sqrt(q_PHD.shape[-1])
