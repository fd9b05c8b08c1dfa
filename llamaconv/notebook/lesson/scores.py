"""Attention scores and attention: where the layouts agree, and how wrong variants differ.

Scores are those of the first layer on the text, before the softmax and without the mask,
computed by `rope.scores`.

Shapes: P positions, H heads of q, G heads of k, D rows of a head, R rows of a weight (H·D or
G·D), F pairs of a head, N distances.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from llamaconv.model import rope
from llamaconv.notebook.lesson.rotation import inverse_frequencies, projected
from llamaconv.notebook.lesson.running import Batch, runs_of_variants, through_layers
from llamaconv.notebook.lesson.specimen import Specimen
from llamaconv.notebook.lesson.variants import RIGHT, ReorderVariant, variants
from llamaconv.report.progress import Steps
from llamaconv.report.tables import Table

# A smaller relative difference is the rounding of float32 sums.
ROUNDING = 1e-4


@dataclass(frozen=True)
class Agreement:
    """The largest differences between the two layouts, relative to the largest number compared.

    Attributes:
        projections: Of x·wq.
        unrotated: Of the scores without a rotation.
        matching: Of the scores, each layout with its own rotation.
        mismatched: Of the scores, both layouts with the interleaved rotation.
        maps: Scores (P, P) of one head: half_split rows with their own rotation, interleaved rows
            with theirs, half_split rows with the interleaved rotation.
        head: The head of ``maps``.
    """

    projections: float
    unrotated: float
    matching: float
    mismatched: float
    maps: tuple[Tensor, Tensor, Tensor] = field(repr=False)
    head: int

    def table(self) -> Table:
        """Return one row per comparison."""
        rows = [
            ("x·wq", "none", self.projections),
            ("scores", "none", self.unrotated),
            ("scores", "each layout's own", self.matching),
            ("scores", "interleaved for both", self.mismatched),
        ]
        return Table(
            ("compared", "rotation", "largest difference, relative", "agree"),
            [
                (what, rotation, f"< {ROUNDING:g}", "yes")
                if difference < ROUNDING
                else (what, rotation, f"{difference:.1g}", "no")
                for what, rotation, difference in rows
            ],
            caption="half_split rows and interleaved rows",
            right=("largest difference, relative",),
        )


def agreement(specimen: Specimen, head: int = 0) -> Agreement:
    """Compare both layouts of the first layer on the excerpt; ``head`` is that of the maps."""
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


@dataclass(frozen=True)
class ScoreErrors:
    """The error of the scores at each distance, for every variant.

    Attributes:
        by_variant: Root mean square errors (N,) at distances 0, 1, 2, …, in units of the right
            scores' own root mean square.
    """

    by_variant: dict[str, Tensor] = field(repr=False)

    @property
    def n_distances(self) -> int:
        """The number of distances, N."""
        return len(next(iter(self.by_variant.values())))


def score_errors(specimen: Specimen, most: int = 128, windows: int = 8) -> ScoreErrors:
    """Measure the errors over all heads of the first layer.

    Args:
        specimen: The model and the text.
        most: The largest number of distances.
        windows: How many windows of the text are read.
    """
    every = variants(specimen.params)
    n_distances = min(most, specimen.tokens.shape[1] - 1)
    squares = torch.zeros(len(every), n_distances)
    scale = torch.zeros(n_distances)
    angles_PF = rope.angles(torch.arange(specimen.tokens.shape[1]), inverse_frequencies(specimen))
    for tokens_P in specimen.tokens[:windows]:
        split = projected(specimen, "half_split", tokens_P)
        right = rope.scores(*split, angles_PF, "half_split")
        scale += _by_distance(right, n_distances)
        for at, variant in enumerate(every):
            found = rope.scores(*_reordered(specimen, variant, *split), angles_PF, "interleaved")
            squares[at] += _by_distance(found - right, n_distances)
    errors = (squares / scale.mean()).sqrt()
    return ScoreErrors({variant.name: errors[at] for at, variant in enumerate(every)})


def _by_distance(scores_HPP: Tensor, n_distances: int) -> Tensor:
    """Return the mean square of the scores at each distance that a query looks back (N,)."""
    squares_PP = scores_HPP.square().mean(0)
    lines = (squares_PP.diagonal(-distance) for distance in range(n_distances))
    return torch.stack([line.mean() for line in lines])


def _reordered(
    specimen: Specimen, variant: ReorderVariant, q_PHD: Tensor, k_PGD: Tensor
) -> tuple[Tensor, Tensor]:
    """Return q and k as ``variant`` leaves them: reordering x·wq is the same as reordering wq."""
    q_RP = variant.apply("wq", q_PHD.flatten(1).T, specimen.params)
    k_RP = variant.apply("wk", k_PGD.flatten(1).T, specimen.params)
    heads = (-1, specimen.params.head_dim)
    return q_RP.T.unflatten(1, heads), k_RP.T.unflatten(1, heads)


@dataclass(frozen=True)
class AttentionMaps:
    """The attention of one head on the excerpt, for every variant.

    Attributes:
        layer: The layer.
        head: The head.
        by_variant: Attention probabilities (P, P), the right variant first.
        unit: What a token is, such as "byte".
        labels: One short text per position: a character, a token as text, or its number.
    """

    layer: int
    head: int
    by_variant: dict[str, Tensor] = field(repr=False)
    unit: str
    labels: tuple[str, ...] = field(default=(), repr=False)

    @property
    def moved(self) -> dict[str, float]:
        """For each wrong variant, the mean share of the attention that goes to wrong positions."""
        right = self.by_variant[RIGHT.name]
        return {
            name: (found - right).abs().sum(-1).mean().item() / 2
            for name, found in self.by_variant.items()
            if name != RIGHT.name
        }


def attention_maps(specimen: Specimen, layer: int, head: int) -> AttentionMaps:
    """Run every variant on the excerpt and keep the maps of one head."""
    found = attention(specimen, layer)
    maps = {name: probabilities[head] for name, probabilities in found.items()}
    labels = specimen.alphabet.labels(specimen.excerpt.tolist())
    return AttentionMaps(layer, head, maps, specimen.unit, labels)


def attention(specimen: Specimen, layer: int) -> dict[str, Tensor]:
    """Return the attention probabilities (H, P, P) of one layer on the excerpt, by variant.

    Runs as many layers as are needed; later calls return the same tensors.
    """
    runs = runs_of_variants(specimen)
    if "attention" not in specimen.cache:
        x_RPC = specimen.embedded(specimen.excerpt).repeat(len(runs), 1, 1)
        specimen.cache["attention"] = Batch(list(runs.values()), x_RPC, attention=[])
    batch: Batch = specimen.cache["attention"]
    missing = layer + 1 - batch.n_layers
    what = f"running {missing} layers on {len(specimen.excerpt)} {specimen.unit}s"
    with torch.no_grad(), Steps(what, missing, specimen.is_slow) as steps:
        through_layers(specimen, batch, layer + 1, steps)
    assert batch.attention is not None
    return dict(zip(runs, batch.attention[layer], strict=True))
