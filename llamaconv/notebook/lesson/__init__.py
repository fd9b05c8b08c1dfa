"""What notebook 3 computes: rotated pairs, scores, wrong variants, and what they cost.

Values, and plain functions of them: `figures` draws them, `panels` adds controls. Everything runs
on a `Specimen`, a checkpoint small enough to run, with `model.rope` and `model.forward`. A wrong
variant changes weights; the code that runs them stays the same.
"""

from llamaconv.notebook.lesson.exercise import ReorderCheck as ReorderCheck
from llamaconv.notebook.lesson.exercise import check_reorder as check_reorder
from llamaconv.notebook.lesson.exercise import compare_programs as compare_programs
from llamaconv.notebook.lesson.honesty import Summary as Summary
from llamaconv.notebook.lesson.honesty import Trained as Trained
from llamaconv.notebook.lesson.honesty import summary as summary
from llamaconv.notebook.lesson.honesty import trained as trained
from llamaconv.notebook.lesson.honesty import when_trained as when_trained
from llamaconv.notebook.lesson.llama_head import LLAMAS as LLAMAS
from llamaconv.notebook.lesson.llama_head import Mismatch as Mismatch
from llamaconv.notebook.lesson.llama_head import Stretch as Stretch
from llamaconv.notebook.lesson.llama_head import layout_mismatch as layout_mismatch
from llamaconv.notebook.lesson.llama_head import mismatch as mismatch
from llamaconv.notebook.lesson.llama_head import stretch as stretch
from llamaconv.notebook.lesson.outcomes import PROMPT as PROMPT
from llamaconv.notebook.lesson.outcomes import AgreementByLength as AgreementByLength
from llamaconv.notebook.lesson.outcomes import Losses as Losses
from llamaconv.notebook.lesson.outcomes import TwoSolutions as TwoSolutions
from llamaconv.notebook.lesson.outcomes import agreement_by_length as agreement_by_length
from llamaconv.notebook.lesson.outcomes import continuations as continuations
from llamaconv.notebook.lesson.outcomes import losses as losses
from llamaconv.notebook.lesson.outcomes import losses_by_layout as losses_by_layout
from llamaconv.notebook.lesson.outcomes import stretched_losses as stretched_losses
from llamaconv.notebook.lesson.outcomes import two_solutions as two_solutions
from llamaconv.notebook.lesson.outcomes import two_texts as two_texts
from llamaconv.notebook.lesson.reveal import Hidden as Hidden
from llamaconv.notebook.lesson.reveal import reveal as reveal
from llamaconv.notebook.lesson.rotation import Projection as Projection
from llamaconv.notebook.lesson.rotation import RotatedPairs as RotatedPairs
from llamaconv.notebook.lesson.rotation import SameDistance as SameDistance
from llamaconv.notebook.lesson.rotation import projection as projection
from llamaconv.notebook.lesson.rotation import rotated_pairs as rotated_pairs
from llamaconv.notebook.lesson.rotation import same_distance as same_distance
from llamaconv.notebook.lesson.rotation import two_forms as two_forms
from llamaconv.notebook.lesson.scores import Agreement as Agreement
from llamaconv.notebook.lesson.scores import AttentionMaps as AttentionMaps
from llamaconv.notebook.lesson.scores import ScoreErrors as ScoreErrors
from llamaconv.notebook.lesson.scores import agreement as agreement
from llamaconv.notebook.lesson.scores import attention_maps as attention_maps
from llamaconv.notebook.lesson.scores import score_errors as score_errors
from llamaconv.notebook.lesson.specimen import Specimen as Specimen
from llamaconv.notebook.lesson.specimen import open_specimen as open_specimen
from llamaconv.notebook.lesson.variants import RIGHT as RIGHT
from llamaconv.notebook.lesson.variants import variants as variants
from llamaconv.notebook.lesson.variants import variants_table as variants_table
from llamaconv.notebook.lesson.variants import wrong_variants as wrong_variants
