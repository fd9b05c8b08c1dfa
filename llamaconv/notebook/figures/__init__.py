"""Pictures of values, each with a text alternative; the only user of matplotlib.

Every function here returns a `Picture`. One file per subject; nothing here reads a checkpoint.
"""

from llamaconv.notebook.figures.checkpoint import shard_strips as shard_strips
from llamaconv.notebook.figures.comparison import differences as differences
from llamaconv.notebook.figures.llama_head import frequencies as frequencies
from llamaconv.notebook.figures.llama_head import mismatch_by_distance as mismatch_by_distance
from llamaconv.notebook.figures.outcomes import agreement_by_length as agreement_by_length
from llamaconv.notebook.figures.outcomes import layouts_and_rotations as layouts_and_rotations
from llamaconv.notebook.figures.outcomes import loss_bars as loss_bars
from llamaconv.notebook.figures.outcomes import loss_by_position as loss_by_position
from llamaconv.notebook.figures.preview import operations as operations
from llamaconv.notebook.figures.preview import sample_rows as sample_rows
from llamaconv.notebook.figures.rope import follow_row as follow_row
from llamaconv.notebook.figures.rope import head_layouts as head_layouts
from llamaconv.notebook.figures.rope import heads_miscounted as heads_miscounted
from llamaconv.notebook.figures.rope import pairings as pairings
from llamaconv.notebook.figures.rope import rotation as rotation
from llamaconv.notebook.figures.rope import same_distance as same_distance
from llamaconv.notebook.figures.rope import the_bug as the_bug
from llamaconv.notebook.figures.scores import attention_maps as attention_maps
from llamaconv.notebook.figures.scores import error_by_distance as error_by_distance
from llamaconv.notebook.figures.scores import projection as projection
from llamaconv.notebook.figures.scores import score_maps as score_maps
from llamaconv.notebook.figures.values import histogram as histogram
from llamaconv.notebook.figures.verification import score_errors as score_errors
