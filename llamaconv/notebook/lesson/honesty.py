"""Whether a model shows what the lesson says, and the figures that its text quotes.

A model with random weights predicts nothing, so wrong rows cannot make it worse. The lesson says so
instead of drawing losses that are all alike.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

from llamaconv.notebook.lesson.outcomes import agreement_by_length, losses
from llamaconv.notebook.lesson.running import FIRST_WINDOWS, outcomes_of, runs_of_variants
from llamaconv.notebook.lesson.scores import score_errors
from llamaconv.notebook.lesson.specimen import Specimen
from llamaconv.notebook.lesson.variants import NOT_REORDERED, RIGHT
from llamaconv.report.errors import printable
from llamaconv.report.tables import Sentence

T = TypeVar("T")

MARGIN = 0.05
"""Nats per token by which the best wrong variant must be worse than the right one."""


@dataclass(frozen=True, repr=False)
class Trained:
    """Whether the weights show the effect. Its text is empty if they do.

    Attributes:
        right: The loss of the right weights on the first windows of the text, in nats per token.
        best_wrong: The smallest loss of a wrong variant.
        guessing: The loss of guessing among all tokens.
        unit: What a token is, such as "byte".
        notice: Why tokens are no text to the model, "" if they are.
    """

    right: float
    best_wrong: float
    guessing: float
    unit: str
    notice: str = ""

    def __bool__(self) -> bool:
        return self.best_wrong > self.right + MARGIN

    @property
    def text(self) -> str:
        """The notice, "" if the model shows the effect and reads text."""
        if self:
            return self.notice
        found = (
            f"This model does not show the effect: it is untrained, too small, or does not know "
            f"this kind of text. Its loss is {self.right:.2f} nats per {self.unit} with the right "
            f"rows and {self.best_wrong:.2f} with the best of the wrong variants; guessing has "
            f"{self.guessing:.2f}. The parts on attention, loss and text are left out. What "
            "concerns rows, rotations and scores holds for any weights."
        )
        return f"{found} {self.notice}." if self.notice else found

    def __repr__(self) -> str:
        return printable(self.text)

    def _repr_html_(self) -> str:
        return (
            f'<div role="note" style="{_BOX}">{html.escape(repr(self))}</div>' if self.text else ""
        )


_BOX = "border:1px solid;border-left-width:6px;padding:0.6em 1em"


def trained(specimen: Specimen) -> Trained:
    """Run every variant on the first windows of the text; later calls return the same value."""
    if "trained" not in specimen.cache:
        runs = list(runs_of_variants(specimen).values())
        right, *wrong = (
            one.loss.mean().item() for one in outcomes_of(specimen, runs, FIRST_WINDOWS)
        )
        guessing = math.log(specimen.params.vocab_size)
        specimen.cache["trained"] = Trained(
            right, min(wrong), guessing, specimen.unit, specimen.alphabet.notice
        )
    found: Trained = specimen.cache["trained"]
    return found


def when_trained(specimen: Specimen, make: Callable[[], T]) -> T | Sentence:
    """Return what ``make`` returns, or a sentence if the weights do not show the effect.

    Args:
        specimen: The model.
        make: Computes and draws one output of a notebook.
    """
    if trained(specimen):
        return make()
    return Sentence("Left out: these weights are untrained or too small to show it.")


@dataclass(frozen=True, repr=False)
class Summary:
    """The figures that the text of the lesson quotes, measured on this specimen.

    Each is computed when it is first asked for.
    """

    specimen: Specimen = field(repr=False)

    @property
    def guessing(self) -> Sentence:
        """The loss of guessing: the logarithm of the number of tokens."""
        size, unit = self.specimen.params.vocab_size, self.specimen.unit
        return Sentence(
            f"A model that guesses among {size} {unit}s has a loss of ln {size} = "
            f"{math.log(size):.1f} nats per {unit}."
        )

    @cached_property
    def distance(self) -> Sentence:
        """The error of the scores of weights that were not reordered, by distance."""
        errors = score_errors(self.specimen).by_variant[NOT_REORDERED.name]
        last = len(errors) - 1
        far = errors[len(errors) // 2 :].square().mean().sqrt().item()
        # Adding zero removes the sign of a rounded zero.
        return Sentence(
            f"If the rows are not reordered, the error of a score is {errors[0] + 0.0:.1f} of a "
            f"typical score at distance 0, {errors[1]:.1f} at distance 1 and {far:.1f} at "
            f"distances {len(errors) // 2} to {last}."
        )

    @cached_property
    def agreement(self) -> Sentence:
        """How often weights that were not reordered predict the right token, by length."""
        found = agreement_by_length(self.specimen)
        name, unit = NOT_REORDERED.name, found.unit
        lengths = [length for length in (1, 2, 32) if length < found.lengths[-1]]
        listed = [
            f"{found.at(name, length):.0%} of {found.windows} texts after {length} "
            f"{unit}{'s' * (length > 1)}"
            for length in lengths
        ]
        return Sentence(
            f"If the rows are not reordered, the most likely next {unit} is that of the right "
            f"model in {_listed(listed)}."
        )

    @cached_property
    def losses(self) -> Sentence:
        """The losses of the right weights and of the wrong variants."""
        means = losses(self.specimen).means
        wrong = [mean for name, mean in means.items() if name != RIGHT.name]
        return Sentence(
            f"The right weights have a loss of {means[RIGHT.name]:.1f} nats per "
            f"{self.specimen.unit}, the wrong variants {min(wrong):.1f} to {max(wrong):.1f}."
        )

    def sentences(self) -> list[Sentence]:
        """Return all of them; without losses and agreement if the weights do not show them."""
        shown = [self.guessing, self.distance]
        return [*shown, self.agreement, self.losses] if trained(self.specimen) else shown

    def __repr__(self) -> str:
        return "\n".join(map(str, self.sentences()))

    def _repr_html_(self) -> str:
        items = "".join(f"<li>{html.escape(str(one))}</li>" for one in self.sentences())
        return f"<ul>{items}</ul>"


def summary(specimen: Specimen) -> Summary:
    """Return the figures that the text quotes, as sentences with the specimen's own numbers."""
    return Summary(specimen)


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
