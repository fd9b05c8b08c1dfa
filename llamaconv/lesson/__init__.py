"""What notebook 3 computes: turned pairs, scores, ways to go wrong, and what they cost.

Values and plain functions of them; `figures` draws, `panels` lets one choose. Everything runs
on a `Specimen`, a checkpoint that is small enough to be run, through `rope` and `model`
themselves. A wrong way is made by changing weights on purpose, never by other code.
"""

from llamaconv.lesson.attention import AttentionMaps, attention_maps
from llamaconv.lesson.llama_head import (
    LLAMAS,
    Mismatch,
    Stretch,
    layout_mismatch,
    mismatch,
    stretch,
)
from llamaconv.lesson.outcomes import (
    Losses,
    WaysOut,
    continuations,
    losses,
    losses_by_layout,
    stretched_losses,
    ways_out,
)
from llamaconv.lesson.scores import Agreement, ScoreErrors, agreement, score_errors
from llamaconv.lesson.specimen import Specimen, open_specimen
from llamaconv.lesson.turns import TurnedPairs, turned_pairs, two_writings
from llamaconv.lesson.ways import RIGHT, Way, ways, ways_table, wrong_ways

__all__ = [
    "LLAMAS",
    "RIGHT",
    "Agreement",
    "AttentionMaps",
    "Losses",
    "Mismatch",
    "ScoreErrors",
    "Specimen",
    "Stretch",
    "TurnedPairs",
    "Way",
    "WaysOut",
    "agreement",
    "attention_maps",
    "continuations",
    "layout_mismatch",
    "losses",
    "losses_by_layout",
    "mismatch",
    "open_specimen",
    "score_errors",
    "stretch",
    "stretched_losses",
    "turned_pairs",
    "two_writings",
    "ways",
    "ways_out",
    "ways_table",
    "wrong_ways",
]
