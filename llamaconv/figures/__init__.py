"""Pictures from values, with words for those who cannot see them; the only user of matplotlib.

Every function here returns a `Picture`. One file a subject; nothing here reads a checkpoint.
"""

from llamaconv.figures.layouts import head_layouts
from llamaconv.figures.picture import Picture
from llamaconv.figures.verdict import score_errors

__all__ = ["Picture", "head_layouts", "score_errors"]
