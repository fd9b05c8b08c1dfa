"""What a wrong layout and a wrong scaling do to a head of Llama 3, by distance.

No weight carries the factor of the scaling, so a converter can only write it down. Nothing here
needs a model: the figures are exact for random q and k, from the rotations of `model.rope`.

Shapes: N distances, D rows of a head, F pairs of a head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llamaconv.model import rope
from llamaconv.model.names import Layout
from llamaconv.model.params import RopeScaling
from llamaconv.model.published import LLAMA_3_THETA, LLAMA_31_SCALING, LLAMA_32_SCALING

# As in their config.json and params.json; only Llama 3.2 1B has heads of 64.
THETA, HEAD_DIM = LLAMA_3_THETA, 128

LLAMAS: dict[str, RopeScaling | None] = {
    "Llama 3": None,
    "Llama 3.1": LLAMA_31_SCALING,
    "Llama 3.2": LLAMA_32_SCALING,
}
"""The scaling of each release."""


@dataclass(frozen=True)
class Stretch:
    """The frequencies of a head, before and after the scaling.

    Attributes:
        by_name: Radians per position of each pair (F,), for each of `LLAMAS`.
        kept: How many of the fastest pairs no scaling changes.
        blended: How many pairs follow that are changed in part.
    """

    by_name: dict[str, Tensor] = field(repr=False)
    kept: int
    blended: int

    @property
    def n_pairs(self) -> int:
        """The number of pairs, F."""
        return len(next(iter(self.by_name.values())))


def stretch() -> Stretch:
    """Return the frequencies of a head of 128 rows, for each of `LLAMAS`."""
    found = {name: rope.inverse_frequencies(HEAD_DIM, THETA, s) for name, s in LLAMAS.items()}
    plain, scaling = found["Llama 3"], LLAMA_31_SCALING
    rotations = scaling.original_max_position * plain / (2 * math.pi)
    kept = int((rotations >= scaling.high_freq_factor).sum())
    slowed = int((rotations <= scaling.low_freq_factor).sum())
    return Stretch(found, kept, len(plain) - kept - slowed)


@dataclass(frozen=True)
class Mismatch:
    """The error of a score by distance, if a model rotates differently than in its training.

    Attributes:
        trained: What the model was trained as.
        run: What it is run as.
        distances: Distances in positions (N,).
        errors: The error at each distance (N,): root mean square over random q and k, in units of
            the right scores' own. 0 is right, 1.4 is unrelated.
    """

    trained: str
    run: str
    distances: Tensor = field(repr=False)
    errors: Tensor = field(repr=False)

    def at(self, distance: int) -> float:
        """Return the error at the nearest of the distances."""
        return self.errors[(self.distances - distance).abs().argmin()].item()


def mismatch(trained: str, run: str) -> Mismatch:
    """Return the error if weights of one of `LLAMAS` run with the scaling of another."""
    right, wrong = (
        _rotations("interleaved", rope.inverse_frequencies(HEAD_DIM, THETA, LLAMAS[name]))
        for name in (trained, run)
    )
    return Mismatch(trained, run, _DISTANCES, _difference(right, wrong))


def layout_mismatch() -> Mismatch:
    """Return the error if half_split rows of Llama 3 run with the interleaved rotation."""
    inverse_F = rope.inverse_frequencies(HEAD_DIM, THETA)
    right, wrong = _rotations("half_split", inverse_F), _rotations("interleaved", inverse_F)
    return Mismatch("half_split rows", "interleaved", _DISTANCES, _difference(right, wrong))


# 0, then 1 to 131,072 in even steps on a logarithmic scale, powers of two among them.
_DISTANCES = torch.cat([torch.zeros(1), 2 ** torch.linspace(0, 17, 17 * 6 + 1)])


def _rotations(layout: Layout, inverse_F: Tensor) -> Tensor:
    """Return the rotation by each distance as a matrix (N, D, D): the unit vectors rotated."""
    units = torch.eye(HEAD_DIM).expand(len(_DISTANCES), -1, -1)
    return rope.rotate(units, rope.angles(_DISTANCES, inverse_F), layout)


def _difference(right_NDD: Tensor, wrong_NDD: Tensor) -> Tensor:
    """Return the root mean square of q·(wrong − right)·k over that of q·right·k (N,).

    For independent entries of variance 1, the mean square of q·M·k is the sum of the squares of M;
    for a rotation it is D.
    """
    return ((wrong_NDD - right_NDD).square().sum((1, 2)) / HEAD_DIM).sqrt()
