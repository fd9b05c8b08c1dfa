"""A checkpoint held in memory to be run, right and wrong: what every step of the lesson looks at.

The concession: float32 and whole, so small models only. A source in any format and either
layout is brought to `half_split` rows first, so that the story is the same for all.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from llamaconv import model, rope
from llamaconv.formats.detect import open_checkpoint
from llamaconv.lesson.ways import Way
from llamaconv.params import LlamaParams
from llamaconv.piece_reader import PieceReader
from llamaconv.plan import Plan
from llamaconv.planner import make_plan
from llamaconv.problems import RefusedError
from llamaconv.sample import held_out_text
from llamaconv.tables import Table, size
from llamaconv.torch_rows import read_rows

# As stored. The sample has 1.6 MB; with a hundred times that a loss would take minutes.
MOST_BYTES = 64_000_000
# At 2 rows a head the re-ordering is the identity, at 4 it is its own inverse.
LEAST_HEAD_DIM = 8
# A window of text, in tokens, where the model can read as many.
WINDOW = 256
# What the maps show: a sentence without indentation, short enough to see single squares.
EXCERPT_START, EXCERPT = b"Dictionaries preserve insertion order.", 40

Weights = dict[tuple[str, int | None], Tensor]


@dataclass(frozen=True, repr=False)
class Specimen:
    """Weights by role and layer, float32, q and k in `half_split` rows; and text to read.

    ``text`` is bytes; tokens are the bytes modulo the vocabulary, which is reading only for a
    model over bytes, as the sample is.
    """

    name: str
    params: LlamaParams
    half_split: Weights
    text: bytes
    _attention: dict[Way, list[Tensor]] = field(default_factory=dict)

    @cached_property
    def interleaved(self) -> Weights:
        """The same weights with q and k in `interleaved` rows, as the converter makes them."""
        heads = {"wq": self.params.n_heads, "wk": self.params.n_kv_heads}
        return {
            (role, layer): rope.half_split_to_interleaved(rows, heads[role])
            if role in heads
            else rows
            for (role, layer), rows in self.half_split.items()
        }

    def gone(self, way: Way) -> Weights:
        """What ``way`` makes of the weights; to be run with the interleaved rotation."""
        return {
            (role, layer): way.apply(role, rows, self.params)
            for (role, layer), rows in self.half_split.items()
        }

    @property
    def reads_bytes(self) -> bool:
        return self.params.vocab_size == 256

    @property
    def unit(self) -> str:
        """What a token is."""
        return "byte" if self.reads_bytes else "token"

    @cached_property
    def tokens(self) -> Tensor:
        """The text as windows that the model can read whole, shape ``(windows, positions)``."""
        window = max(2, min(WINDOW, self.params.max_position or WINDOW))
        tokens = torch.tensor(list(self.text)) % self.params.vocab_size
        whole = len(tokens) // window * window
        return tokens[:whole].reshape(-1, window)

    @cached_property
    def excerpt(self) -> Tensor:
        """Some tokens of the text, shape ``(positions,)``, for pictures of single ones."""
        start = max(0, self.text.find(EXCERPT_START))
        length = min(EXCERPT, self.tokens.shape[1])
        return torch.tensor(list(self.text[start : start + length])) % self.params.vocab_size

    def attention(self, way: Way, layer: int) -> Tensor:
        """Attention probabilities of one layer on the excerpt, ``(heads, positions, positions)``.

        Run once for each way, and kept.
        """
        if way not in self._attention:
            maps: list[Tensor] = []
            with torch.no_grad():
                model.forward(self.gone(way), self.params, self.excerpt[None], "interleaved", maps)
            self._attention[way] = [one[0] for one in maps]
        return self._attention[way][layer]

    def table(self) -> Table:
        rows = [
            ("model", f"{self.name}: {self.params}"),
            ("in memory", size(sum(4 * rows.numel() for rows in self.half_split.values()))),
            ("text", f"{self.tokens.numel()} {self.unit}s, {self.tokens.shape[1]} at a time"),
        ]
        return Table(("specimen", ""), rows)

    def __repr__(self) -> str:
        return f"<Specimen {self.name}: {self.params}>"

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def open_specimen(source: str | Path) -> Specimen:
    """The checkpoint at ``source``, read whole, with the sample's held-out text.

    Raises `RefusedError` where it is no Llama that can be converted, or too large to be run.
    """
    if str(source).startswith("hf://"):
        raise RefusedError(
            f"{source}: the lesson runs the model, so its weights have to be here; download it "
            "and name the folder, or leave source empty for the bundled sample"
        )
    checkpoint = open_checkpoint(source)
    plan = make_plan(checkpoint)
    params, _ = plan.ready()
    _check_small(plan)
    return Specimen(checkpoint.path.name, params, _read(plan), held_out_text())


def _check_small(plan: Plan) -> None:
    params, _ = plan.ready()
    path = plan.source.path
    if plan.bytes_to_read > MOST_BYTES:
        raise RefusedError(
            f"{path}: has {size(plan.bytes_to_read)} of weights; the lesson runs the model many "
            f"times, right and wrong, and takes up to {size(MOST_BYTES)}. Leave source empty for "
            "the bundled sample; notebooks 1, 2, 4 and 5 take a model of any size"
        )
    if params.head_dim < LEAST_HEAD_DIM:
        raise RefusedError(
            f"{path}: has heads of {params.head_dim} rows; the lesson needs "
            f"{LEAST_HEAD_DIM} or more, since with fewer some wrong re-orderings are right ones"
        )


def _read(plan: Plan) -> Weights:
    """Every tensor that the plan moves, by role and layer, q and k in half_split rows."""
    params, layout = plan.ready()
    weights: Weights = {}
    with PieceReader() as reader:
        for move in plan.written:
            info = plan.source.tensors[move.source]
            rows = read_rows(reader, info, 0, info.n_rows).float()
            if move.role and (n_heads := move.role.n_heads(params)):
                rows = rope.relayout(rows, n_heads, layout, "half_split")
            weights[move.place] = rows
    # A tied head that is not stored is the embedding.
    weights.setdefault(("output", None), weights["tok_embeddings", None])
    return weights
