"""Attention scores in both layouts: what agrees, what does not, and how far apart they drift.

Scores of the first layer on the text, before the softmax and without the mask, through
`rope.scores`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llamaconv import rope
from llamaconv.lesson.specimen import Specimen
from llamaconv.lesson.turns import inverse_frequencies, projected
from llamaconv.lesson.ways import RIGHT, Way, wrong_ways
from llamaconv.tables import Table

# Below this, relative, two sides agree but for the rounding of float32 sums.
ROUNDING = 1e-4


@dataclass(frozen=True, repr=False)
class Agreement:
    """Largest differences between the layouts, relative to the largest number compared.

    ``maps`` are score maps ``(P, P)`` of one head: half_split rows with their own rotation,
    interleaved rows with theirs, half_split rows with the interleaved rotation.
    """

    projections: float
    unrotated: float
    matching: float
    mismatched: float
    maps: tuple[Tensor, Tensor, Tensor]
    head: int

    def table(self) -> Table:
        rows = [
            ("x·wq", "none", self.projections),
            ("scores", "none", self.unrotated),
            ("scores", "each layout's own", self.matching),
            ("scores", "interleaved for both", self.mismatched),
        ]
        shown = [(*row[:2], _shown(row[2]), "yes" if row[2] < ROUNDING else "no") for row in rows]
        return Table(
            ("compared", "rotation", "largest difference, relative", "agree"),
            shown,
            caption="half_split rows against interleaved rows",
            right=("largest difference, relative",),
        )

    def __repr__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def _shown(value: float) -> str:
    return f"< {ROUNDING:g}" if value < ROUNDING else f"{value:.1g}"


def agreement(specimen: Specimen, head: int = 0) -> Agreement:
    """Both layouts of the first layer on the excerpt."""
    tokens_P = specimen.excerpt
    angles_PF = rope.angles(torch.arange(len(tokens_P)), inverse_frequencies(specimen))
    split = projected(specimen, "half_split", tokens_P)
    woven = projected(specimen, "interleaved", tokens_P)
    own_split = rope.scores(*split, angles_PF, "half_split")
    own_woven = rope.scores(*woven, angles_PF, "interleaved")
    wrong = rope.scores(*split, angles_PF, "interleaved")
    return Agreement(
        projections=_difference(split[0], woven[0]),
        unrotated=_difference(
            rope.scores(*split, None, "half_split"), rope.scores(*woven, None, "interleaved")
        ),
        matching=_difference(own_split, own_woven),
        mismatched=_difference(own_split, wrong),
        maps=(own_split[head], own_woven[head], wrong[head]),
        head=head,
    )


def _difference(one: Tensor, other: Tensor) -> float:
    return ((one - other).abs().max() / one.abs().max()).item()


@dataclass(frozen=True, repr=False)
class ScoreErrors:
    """Root mean square error of the scores at each distance, in units of the right scores' own.

    ``by_way`` has one tensor ``(distances,)`` a way, the right way's among them, whose error is
    rounding.
    """

    by_way: dict[str, Tensor]

    @property
    def n_distances(self) -> int:
        return len(next(iter(self.by_way.values())))

    def __repr__(self) -> str:
        return f"<ScoreErrors of {', '.join(self.by_way)} at {self.n_distances} distances>"


def score_errors(specimen: Specimen, most: int = 128, windows: int = 8) -> ScoreErrors:
    """Errors at distances 0, 1, 2, …, over all heads of the first layer, on windows of text."""
    every = (RIGHT, *wrong_ways(specimen.params))
    n_distances = min(most, specimen.tokens.shape[1] - 1)
    squares = torch.zeros(len(every), n_distances)
    scale = torch.zeros(n_distances)
    for tokens_P in specimen.tokens[:windows]:
        angles_PF = rope.angles(torch.arange(len(tokens_P)), inverse_frequencies(specimen))
        right = rope.scores(*projected(specimen, "half_split", tokens_P), angles_PF, "half_split")
        scale += _by_distance(right, n_distances)
        for at, way in enumerate(every):
            found = rope.scores(*_gone(specimen, way, tokens_P), angles_PF, "interleaved")
            squares[at] += _by_distance(found - right, n_distances)
    errors = (squares / scale.mean()).sqrt()
    return ScoreErrors({way.name: errors[at] for at, way in enumerate(every)})


def _by_distance(scores_HPP: Tensor, n_distances: int) -> Tensor:
    """Mean square of the scores at each distance that a query looks back."""
    lines = (scores_HPP.diagonal(-distance, dim1=1, dim2=2) for distance in range(n_distances))
    return torch.stack([line.square().mean() for line in lines])


def _gone(specimen: Specimen, way: Way, tokens_P: Tensor) -> tuple[Tensor, Tensor]:
    """q and k of the first layer as ``way`` leaves their rows; re-ordering x·wq is re-ordering wq."""
    params = specimen.params
    q_PHD, k_PGD = projected(specimen, "half_split", tokens_P)
    q_RP = way.apply("wq", q_PHD.flatten(1).T, params)
    k_RP = way.apply("wk", k_PGD.flatten(1).T, params)
    heads = (-1, params.head_dim)
    return q_RP.T.unflatten(1, heads), k_RP.T.unflatten(1, heads)
