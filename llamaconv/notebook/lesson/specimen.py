"""A checkpoint that every step of the lesson runs, right and wrong, and a text for it to read.

A source of any format and layout is read as `half_split` rows, so that the lesson is the same for
all.

The concession: float32, without a GPU. A model of up to 16 million parameters is kept in memory.
A larger one is read one layer at a time: its peak is the float32 copy of one layer, some
rows of the vocabulary, and the activations of all variants for a text that gets shorter as the
model gets larger. On top of a process that has imported torch, 400 MB were measured for a model
with 135 million parameters, and 460 MB for the sizes of Llama 3.2 1B. Pages of files, which the
system takes back, are not counted.

Shapes: W windows of text, P positions, C width of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamaconv.checkpoint.open import open_checkpoint
from llamaconv.checkpoint.store_address import SCHEME
from llamaconv.model.params import LlamaParams
from llamaconv.notebook.lesson.tokens import Tokens, open_tokens
from llamaconv.notebook.lesson.variants import RIGHT, ReorderVariant
from llamaconv.notebook.lesson.weights import (
    ReorderedWeights,
    StoredWeights,
    Weights,
    count_parameters,
)
from llamaconv.plan.plan import Plan
from llamaconv.plan.planner import make_plan
from llamaconv.report.errors import RefusedError
from llamaconv.report.tables import Table, size
from llamaconv.sample import held_out_text

# Llama 3.2 1B has 1.24 billion. All cells together then take some three minutes on two cores.
MOST_PARAMETERS = 1_600_000_000
# With 2 rows per head the reordering is the identity, with 4 it is its own inverse.
LEAST_HEAD_DIM = 8
# Tokens in a window of text, if the model can read as many.
WINDOW = 256
# Parameters times tokens of text that each variant reads.
WORK = 140_000_000_000
# The same product, three times that of the sample.
SLOW = 20_000_000_000
LEAST_TOKENS, MOST_TOKENS = 192, 8192
# What the maps show: a sentence without indentation, short enough to see single squares. Tokens
# of a tokenizer are longer than bytes.
EXCERPT_START, EXCERPT_BYTES, EXCERPT_TOKENS = "Dictionaries preserve insertion order.", 40, 24


@dataclass(frozen=True, repr=False, eq=False)
class Specimen:
    """A model and a text for it to read.

    Attributes:
        name: The name of its folder.
        params: Its parameters.
        half_split: Its weights in float32, q and k in half_split rows.
        text: The text.
        alphabet: How it reads text.
        cache: What was computed and is used again, by what it is.
    """

    name: str
    params: LlamaParams
    half_split: StoredWeights
    text: str
    alphabet: Tokens
    cache: dict[Any, Any] = field(default_factory=dict)

    @cached_property
    def interleaved(self) -> Weights:
        """The same weights with q and k in interleaved rows, as the converter writes them."""
        return self.apply_variant(RIGHT)

    def apply_variant(self, variant: ReorderVariant) -> Weights:
        """Return the weights as ``variant`` leaves them, to run with the interleaved rotation."""
        return ReorderedWeights(self.half_split, variant, self.params)

    @property
    def unit(self) -> str:
        """What a token is called."""
        return self.alphabet.unit

    @property
    def is_large(self) -> bool:
        """Whether the weights are read one layer at a time, which takes a while."""
        return not self.half_split.is_kept

    @property
    def is_slow(self) -> bool:
        """Whether a cell may take more than two seconds, so that it reports its progress."""
        return self.half_split.n_parameters * self.tokens.numel() > SLOW

    @cached_property
    def tokens(self) -> Tensor:
        """The text cut into windows that the model can read (W, P).

        Each begins as the model expects a text to begin. A large model reads fewer and shorter
        windows.
        """
        most = WORK // self.half_split.n_parameters
        most = max(LEAST_TOKENS, min(MOST_TOKENS, most))
        window = most // (16 if most >= 512 else 8) // 8 * 8
        window = max(2, min(WINDOW, self.params.max_position or WINDOW, window))
        start = self.alphabet.start()[: window - 1]
        tokens, step = self._all_tokens, window - len(start)
        windows = [
            start + tokens[at : at + step]
            for at in range(0, min(len(tokens) - step, (most // window - 1) * step) + 1, step)
        ]
        return torch.tensor(windows)

    @cached_property
    def excerpt(self) -> Tensor:
        """A few tokens of the text (P,), for pictures that show single positions."""
        text = self.text[max(0, self.text.find(EXCERPT_START)) :]
        length = EXCERPT_TOKENS if self.alphabet.tokenizer else EXCERPT_BYTES
        tokens = self.alphabet.start() + self.alphabet.encode(text[: 8 * EXCERPT_BYTES])
        return torch.tensor(tokens[: min(length, self.tokens.shape[1])])

    @cached_property
    def _all_tokens(self) -> list[int]:
        return self.alphabet.encode(self.text)

    def embedded(self, tokens: Tensor) -> Tensor:
        """Return the embeddings of tokens of any shape (..., C)."""
        numbers, places = tokens.unique(return_inverse=True)
        runs: Sequence[tuple[int, int]] = [(each, each + 1) for each in numbers.tolist()]
        return self.half_split.rows("tok_embeddings", runs)[places]

    def table(self) -> Table:
        """Return the model, its memory and the text."""
        memory = size(4 * self.half_split.n_parameters)
        if self.is_large:
            memory = f"one layer at a time; all of them would take {memory}"
        windows, length = self.tokens.shape
        rows = [
            ("model", f"{self.name}: {self.params}"),
            ("in memory", memory),
            ("text", f"{windows * length} {self.unit}s, {length} at a time"),
        ]
        if self.alphabet.tokenizer:
            rows.append(("tokenizer", f"tokenizer.json, {self.alphabet.vocab_size} tokens"))
        if self.alphabet.notice:
            rows.append(("tokenizer", self.alphabet.notice))
        return Table(("specimen", ""), rows)

    def __repr__(self) -> str:
        return f"<Specimen {self.name}: {self.params}>"

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def open_specimen(source: str | Path) -> Specimen:
    """Open a checkpoint to run it.

    Args:
        source: A folder or file of any supported format.

    Returns:
        The model, with the sample's held-out text.

    Raises:
        RefusedError: The source cannot be converted, is not on this machine, or is too large.
    """
    if SCHEME.match(str(source)):
        raise RefusedError(
            f"{source}: the lesson runs the model, so it needs the weights on this machine. "
            "Download them and set source to their folder, or leave it empty for the bundled sample"
        )
    checkpoint = open_checkpoint(source)
    plan = make_plan(checkpoint)
    params, _ = plan.ready()
    _check_size(plan, params)
    name = checkpoint.path.name
    text = held_out_text().decode()
    alphabet = open_tokens(plan.assets, params.vocab_size, name, text)
    return Specimen(name, params, StoredWeights(plan), text, alphabet)


def _check_size(plan: Plan, params: LlamaParams) -> None:
    path = plan.source.path
    n_parameters = count_parameters(plan)
    if n_parameters > MOST_PARAMETERS:
        raise RefusedError(
            f"{path}: has {_count(n_parameters)} parameters ({size(plan.bytes_to_read)}); the "
            "lesson runs the model many times on the CPU and accepts up to "
            f"{_count(MOST_PARAMETERS)}. Leave source empty for the bundled sample; notebooks 1, "
            "2, 4 and 5 accept a model of any size"
        )
    if params.head_dim < LEAST_HEAD_DIM:
        raise RefusedError(
            f"{path}: has heads of {params.head_dim} rows; the lesson needs {LEAST_HEAD_DIM} or "
            "more, because in smaller heads some wrong reorderings are right"
        )


def _count(number: int) -> str:
    for unit, name in ((10**9, "billion"), (10**6, "million")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return str(number)
