"""Pictures from values, with words for those who cannot see them; the only user of matplotlib.

Every function here returns a `Picture`. One file a subject; nothing here reads a checkpoint.
"""

from llamaconv.figures.attention import attention_maps
from llamaconv.figures.checkpoint import shard_strips
from llamaconv.figures.layouts import head_layouts
from llamaconv.figures.llama_head import frequencies, mismatch_by_distance
from llamaconv.figures.outcomes import layouts_and_rotations, loss_bars, loss_by_position
from llamaconv.figures.picture import Picture
from llamaconv.figures.preview import operations, sample_rows
from llamaconv.figures.rope import follow_row, pairings, turning
from llamaconv.figures.scores import error_by_distance, score_maps
from llamaconv.figures.verdict import score_errors

__all__ = [
    "Picture",
    "attention_maps",
    "error_by_distance",
    "follow_row",
    "frequencies",
    "head_layouts",
    "layouts_and_rotations",
    "loss_bars",
    "loss_by_position",
    "mismatch_by_distance",
    "operations",
    "pairings",
    "sample_rows",
    "score_errors",
    "score_maps",
    "shard_strips",
    "turning",
]
