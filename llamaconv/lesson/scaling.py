"""Llama 3's scaling of the frequencies, and what a wrong factor does with distance.

No weight carries the factor, so a converter can only write it down. Nothing here needs a model:
the figures are those of a head as the Llamas have it, from `rope.inverse_frequencies`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from llamaconv import rope
from llamaconv.params import RopeScaling

# As in their config.json and params.json; only Llama 3.2 1B has heads of 64.
THETA, HEAD_DIM = 500_000.0, 128
ORIGINAL = 8192

LLAMAS: dict[str, RopeScaling | None] = {
    "Llama 3": None,
    "Llama 3.1": RopeScaling(8.0, 1.0, 4.0, ORIGINAL),
    "Llama 3.2": RopeScaling(32.0, 1.0, 4.0, ORIGINAL),
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
    """Error of a score by distance where a model runs with another Llama's scaling.

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
        return f"<Mismatch: trained as {self.trained}, run as {self.run}>"


def mismatch(trained: str, run: str) -> Mismatch:
    """For two names of `LLAMAS`, at distances from 0 to 131072, evenly on a logarithmic scale.

    A pair of q and k contributes |q||k| cos(φ + d·f) to a score. For random ones the mean square
    of the difference between two frequencies f is that of |e^{idf} − e^{idf'}|, pair by pair.
    """
    distances = torch.unique(torch.cat([torch.tensor([0.0]), torch.logspace(0, 17, 120, base=2)]))
    right, wrong = (
        rope.inverse_frequencies(HEAD_DIM, THETA, LLAMAS[name]) for name in (trained, run)
    )
    apart_NF = torch.outer(distances.double(), (right - wrong).double())
    errors = (2 * torch.sin(apart_NF / 2)).square().mean(-1).sqrt()
    return Mismatch(trained, run, distances, errors)
