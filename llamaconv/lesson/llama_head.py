"""A head as the Llamas have it: what a wrong layout and a wrong scaling do with distance.

No weight carries the factor of the scaling, so a converter can only write it down. Nothing here
needs a model: the figures are exact for random q and k, from the rotations of `rope`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from llamaconv import rope
from llamaconv.family import LLAMA_3_THETA, LLAMA_31_SCALING, LLAMA_32_SCALING
from llamaconv.keys import Layout
from llamaconv.params import RopeScaling

# As in their config.json and params.json; only Llama 3.2 1B has heads of 64.
THETA, HEAD_DIM = LLAMA_3_THETA, 128
ORIGINAL = LLAMA_31_SCALING.original_max_position

LLAMAS: dict[str, RopeScaling | None] = {
    "Llama 3": None,
    "Llama 3.1": LLAMA_31_SCALING,
    "Llama 3.2": LLAMA_32_SCALING,
}


@dataclass(frozen=True, repr=False)
class Stretch:
    """Radians per position of each pair, ``(F,)``, by the name of a Llama.

    ``kept`` and ``blended`` count the pairs that no scaling changes and those between.
    """

    by_name: dict[str, Tensor]
    kept: int
    blended: int

    @property
    def n_pairs(self) -> int:
        return len(next(iter(self.by_name.values())))

    def __repr__(self) -> str:
        slow = self.n_pairs - self.kept - self.blended
        return f"<Stretch: {self.kept} pairs kept, {self.blended} blended, {slow} divided by the factor>"


def stretch() -> Stretch:
    """The frequencies of each Llama's head of 128 rows."""
    found = {name: rope.inverse_frequencies(HEAD_DIM, THETA, s) for name, s in LLAMAS.items()}
    plain = found["Llama 3"]
    scaling = LLAMAS["Llama 3.1"]
    assert scaling is not None
    turns = scaling.original_max_position * plain / (2 * math.pi)
    kept = int((turns >= scaling.high_freq_factor).sum())
    slowed = int((turns <= scaling.low_freq_factor).sum())
    return Stretch(found, kept, len(plain) - kept - slowed)


@dataclass(frozen=True, repr=False)
class Mismatch:
    """Error of a score by distance where a model turns otherwise than it was trained to.

    ``errors`` at ``distances``, both ``(n,)``: root mean square over random q and k, in units of
    the right scores' own; 0 is right, 1.4 is no relation at all.
    """

    trained: str
    run: str
    distances: Tensor
    errors: Tensor

    def at(self, distance: int) -> float:
        """The error at the nearest of the distances."""
        return self.errors[(self.distances - distance).abs().argmin()].item()

    def __repr__(self) -> str:
        return f"<Mismatch: {self.trained}, run as {self.run}>"


def mismatch(trained: str, run: str) -> Mismatch:
    """The scaling of one Llama with the weights of another, both named as in `LLAMAS`."""
    right, wrong = (
        _turns("interleaved", rope.inverse_frequencies(HEAD_DIM, THETA, LLAMAS[name]))
        for name in (trained, run)
    )
    return Mismatch(trained, run, _DISTANCES, _difference(right, wrong))


def layout_mismatch() -> Mismatch:
    """half_split rows of a head of Llama 3 with the interleaved rotation."""
    inverse_F = rope.inverse_frequencies(HEAD_DIM, THETA)
    right, wrong = _turns("half_split", inverse_F), _turns("interleaved", inverse_F)
    return Mismatch("half_split rows", "interleaved", _DISTANCES, _difference(right, wrong))


# 0, then 1 to 131072 in even steps on a logarithmic scale; powers of two are among them.
_DISTANCES = torch.cat([torch.zeros(1), 2 ** torch.linspace(0, 17, 17 * 6 + 1)])


def _turns(layout: Layout, inverse_F: Tensor) -> Tensor:
    """The turn by each distance as a matrix, ``(N, D, D)``: what the rotation makes of unit rows."""
    units = torch.eye(HEAD_DIM).expand(len(_DISTANCES), -1, -1)
    return rope.rotate(units, rope.angles(_DISTANCES, inverse_F), layout)


def _difference(right_NDD: Tensor, wrong_NDD: Tensor) -> Tensor:
    """Root mean square of q·(wrong − right)·k over that of q·right·k, for random q and k.

    For independent entries of variance one the mean square of q·M·k is the sum of M's squares,
    and that of a turn is D.
    """
    return ((wrong_NDD - right_NDD).square().sum((1, 2)) / HEAD_DIM).sqrt()
