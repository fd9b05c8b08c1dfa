"""What right and wrong weights do to text: losses, agreement by length, and continuations.

The loss is the mean cross-entropy of the next token, in nats, over the windows of the specimen.

Shapes: R runs, W windows of text, P positions, C width of the model, V tokens of the vocabulary.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llamaconv.model.names import Layout
from llamaconv.model.params import RopeScaling
from llamaconv.notebook.lesson.running import (
    Batch,
    Run,
    continued,
    normed,
    outcomes_of,
    runs_of_variants,
    through_layers,
    vocabulary,
)
from llamaconv.notebook.lesson.specimen import Specimen
from llamaconv.notebook.lesson.variants import NOT_REORDERED, RIGHT, ReorderVariant
from llamaconv.report.progress import Steps
from llamaconv.report.tables import Table

PROMPT = 'Return "True" if *x* is in '
"""The prompt if none is given."""

# Logits of the two layouts differ only by the rounding of float32 sums, over all layers.
ROUNDING_OF_LOGITS = 1e-3

# Parameters times tokens that a large model writes: it reads its weights for each token.
_WORK, _LEAST_WRITTEN = 4_000_000_000, 12
# Tokens of a prompt that it reads, and of what follows.
_MOST_READ = 256

_ROWS: dict[Layout, ReorderVariant] = {"half_split": NOT_REORDERED, "interleaved": RIGHT}


@dataclass(frozen=True)
class Losses:
    """The loss of several runs, by position.

    Attributes:
        by_name: For each run the mean loss (P - 1,) in nats. Entry p is the loss of token p + 1,
            which the model predicts from p + 1 tokens.
        unit: What a token is, such as "byte".
    """

    by_name: dict[str, Tensor] = field(repr=False)
    unit: str

    @property
    def means(self) -> dict[str, float]:
        """For each run the mean loss over the whole text, in nats per token."""
        return {name: loss.mean().item() for name, loss in self.by_name.items()}


def losses(specimen: Specimen) -> Losses:
    """Run every variant with the interleaved rotation; the right one comes first."""
    return _losses(specimen, runs_of_variants(specimen))


def losses_by_layout(specimen: Specimen) -> Losses:
    """Run rows of both layouts with both rotations, named ``ROWS rows, ROTATION rotation``."""
    runs = {
        f"{rows} rows, {rotation} rotation": Run(_ROWS[rows], rotation)
        for rows in _ROWS
        for rotation in _ROWS
    }
    return _losses(specimen, runs)


def _losses(specimen: Specimen, runs: dict[str, Run]) -> Losses:
    found = outcomes_of(specimen, list(runs.values()))
    means = {name: one.loss.mean(0) for name, one in zip(runs, found, strict=True)}
    return Losses(means, specimen.unit)


@dataclass(frozen=True)
class AgreementByLength:
    """How often wrong weights predict the same token as the right ones, by the tokens read.

    Attributes:
        by_length: For each wrong variant the share of windows (P,), 0 to 1, in which its most
            likely next token is that of the right weights. Entry p is after p + 1 tokens.
        windows: How many windows of text were read.
        unit: What a token is, such as "byte".
    """

    by_length: dict[str, Tensor] = field(repr=False)
    windows: int
    unit: str

    def at(self, variant: str, length: int) -> float:
        """Return the share of windows after ``length`` tokens."""
        return self.by_length[variant][length - 1].item()

    @property
    def lengths(self) -> tuple[int, ...]:
        """The edges of groups of lengths, half-open; one more than there are groups."""
        longest = len(next(iter(self.by_length.values())))
        return (*(edge for edge in _EDGES if edge <= longest), longest + 1)

    @property
    def by_variant(self) -> dict[str, tuple[float, ...]]:
        """For each wrong variant the mean share in each group."""
        groups = list(itertools.pairwise(self.lengths))
        return {
            name: tuple(shares[first - 1 : end - 1].mean().item() for first, end in groups)
            for name, shares in self.by_length.items()
        }


# Single lengths, then groups that end at 5, 8, 12, 32, 64 and so on.
_EDGES = (1, 2, 3, 4, 6, 9, 13, 33, 65, 129)


def agreement_by_length(specimen: Specimen) -> AgreementByLength:
    """Compare the most likely next token of each wrong variant with that of the right one.

    The runs are those of `losses`, which are not repeated.
    """
    runs = runs_of_variants(specimen)
    right, *wrong = outcomes_of(specimen, list(runs.values()))
    shares = {
        name: (one.best == right.best).float().mean(0)
        for name, one in zip(list(runs)[1:], wrong, strict=True)
    }
    return AgreementByLength(shares, len(right.best), specimen.unit)


@dataclass(frozen=True)
class TwoSolutions:
    """The two right combinations of rows and rotation, run on one window of text.

    Attributes:
        losses: The loss of each, in nats per token.
        logits: The largest difference of their logits, relative to the largest logit.
        unit: What a token is, such as "byte".
    """

    losses: dict[str, float]
    logits: float
    unit: str

    @property
    def agree(self) -> bool:
        """Whether the two differ by rounding only."""
        one, other = self.losses.values()
        same_loss = abs(one - other) < ROUNDING_OF_LOGITS * (1 + one)
        return self.logits < ROUNDING_OF_LOGITS and same_loss

    def table(self) -> Table:
        """Return one row per solution."""
        column = f"loss, nats per {self.unit}"
        rows = [(name, f"{loss:.2f}") for name, loss in self.losses.items()]
        small = self.logits < ROUNDING_OF_LOGITS
        shown = f"less than {ROUNDING_OF_LOGITS:g}" if small else f"{self.logits:.1g}"
        caption = f"largest difference of the logits, relative: {shown}"
        return Table(("solution", column), rows, caption=caption, right=(column,))


def two_solutions(specimen: Specimen) -> TwoSolutions:
    """Run half_split rows and interleaved rows, each with its own rotation."""
    tokens_WP = specimen.tokens[:1]
    runs = [Run(_ROWS[layout], layout) for layout in ("interleaved", "half_split")]
    n_layers = specimen.params.n_layers
    what = f"running two solutions on {tokens_WP.numel()} {specimen.unit}s"
    with torch.no_grad(), Steps(what, n_layers, specimen.is_slow) as steps:
        batch = Batch(runs, specimen.embedded(tokens_WP).repeat(2, 1, 1))
        through_layers(specimen, batch, n_layers, steps)
        x_RPC = normed(specimen, batch.x)
        difference = largest = 0.0
        for _, rows_VC in vocabulary(specimen):
            woven_PV, split_PV = x_RPC @ rows_VC.T
            difference = max(difference, (woven_PV - split_PV).abs().max().item())
            largest = max(largest, split_PV.abs().max().item())
    woven, split = (one.loss[0].mean().item() for one in outcomes_of(specimen, runs, 1))
    return TwoSolutions(
        {
            "interleaved rows, original rotation": woven,
            "half_split rows, rotate-half rotation": split,
        },
        difference / (largest or 1.0),
        specimen.unit,
    )


def stretched_losses(specimen: Specimen, factor: float = 8.0) -> Losses:
    """Run the model as trained, and with a scaling that it was not trained with.

    The original length is the length of the specimen's windows, as that of Llama 3.1 is the
    length that Llama 3 was trained on.
    """
    scaling = RopeScaling(factor, 1.0, 4.0, specimen.tokens.shape[1])
    runs = {"as trained": Run(RIGHT), f"with factor {factor:g}": Run(RIGHT, scaling=scaling)}
    return _losses(specimen, runs)


def continuations(specimen: Specimen, prompt: str = "", length: int = 40) -> Table:
    """Return one row per variant: the prompt continued by the most likely tokens.

    Args:
        specimen: The model.
        prompt: A text; `PROMPT` if empty.
        length: How many tokens to add. A large model adds fewer.
    """
    caption, written = _continued(specimen, prompt or PROMPT, length)
    return Table(("weights", "continued"), list(written.items()), caption=caption)


def two_texts(
    specimen: Specimen, prompt: str = "", wrong: str = NOT_REORDERED.name, length: int = 40
) -> Table:
    """Return the prompt continued by the right weights, and next to it by a wrong variant.

    Args:
        specimen: The model.
        prompt: As for `continuations`.
        wrong: The name of the wrong variant.
        length: As for `continuations`.
    """
    caption, written = _continued(specimen, prompt or PROMPT, length)
    names = (RIGHT.name, wrong)
    return Table(names, [tuple(written[name] for name in names)], caption=caption)


def _continued(specimen: Specimen, prompt: str, length: int) -> tuple[str, dict[str, str]]:
    """Return a caption, and what each variant writes after the prompt; computed once."""
    alphabet, most = specimen.alphabet, specimen.params.max_position or 2**30
    if specimen.is_large:
        length = min(length, max(_LEAST_WRITTEN, _WORK // specimen.half_split.n_parameters))
        most = min(most, _MOST_READ)
    tokens = alphabet.start() + alphabet.encode(prompt)
    length = min(length, most - 1)
    read = tokens[max(0, len(tokens) + length - most) :]
    caption = f"{prompt.strip()} …"
    if len(read) < len(tokens):
        caption += f" (the last {len(read)} of {len(tokens)} {specimen.unit}s were read)"
    if not alphabet.are_text:
        caption += " (read and written as numbers: the model has no tokenizer.json)"
    runs = runs_of_variants(specimen)
    key = ("continued", tuple(read), length)
    if key not in specimen.cache:
        specimen.cache[key] = continued(specimen, list(runs.values()), read, length)
    made: list[list[int]] = specimen.cache[key]
    return caption, {name: alphabet.decode(one, read) for name, one in zip(runs, made, strict=True)}
