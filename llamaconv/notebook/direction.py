"""What a conversion does to the rows of q and k, in a sentence: it depends on the two formats."""

from __future__ import annotations

from llamaconv.checkpoint.checkpoint import Checkpoint
from llamaconv.plan.plan import Plan
from llamaconv.plan.target import RULES
from llamaconv.report.errors import printable
from llamaconv.report.tables import Sentence


def of_plan(plan: Plan) -> Sentence:
    """Say what a plan does to rows and names."""
    return _sentence(plan.source, str(plan.target), plan.target.layout)


def between(source: Checkpoint, target: Checkpoint) -> Sentence:
    """Say what the conversion did that led from one checkpoint to the other."""
    return _sentence(source, _title(target), target.rope)


def _sentence(source: Checkpoint, to: str, layout: str | None) -> Sentence:
    start = f"From {_title(source)} to {to}: "
    if source.rope is None or layout is None:
        return Sentence(f"{start}the order of the rows of q and k is not known.")
    if source.rope == layout:
        return Sentence(
            f"{start}no row moves, because both keep the rows of q and k {layout}. The conversion "
            "changes names and files."
        )
    return Sentence(
        f"{start}the rows of every head of q and k go from {source.rope} to {layout}. All other "
        "tensors keep their rows; names and files change."
    )


def _title(found: Checkpoint) -> str:
    title = RULES[found.format].title
    return printable(f"{title} {found.generation}" if found.generation else title)
