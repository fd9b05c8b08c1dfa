"""The weights of a specimen by role and layer, read when they are asked for.

A small model is read once and kept. Of a larger one, each tensor is read and dropped again, so
that no more than one layer, or some rows of the vocabulary, are in memory.

Limit: every access to a tensor of a large model reads its file; read a layer once for all runs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from llamaconv.checkpoint.reader import PieceReader
from llamaconv.checkpoint.torch_rows import TensorBuffer, read_rows
from llamaconv.model import rope
from llamaconv.model.forward import layer_roles
from llamaconv.model.params import LlamaParams
from llamaconv.notebook.lesson.variants import ReorderVariant
from llamaconv.plan.plan import Move, Plan

Place = tuple[str, int | None]
"""A role and a layer; the layer is None for tensors outside the layers."""

Weights = Mapping[Place, Tensor]
"""Weights by role and layer, float32."""

# In float32. The sample has 3.3 MB.
MOST_KEPT = 64_000_000


def count_parameters(plan: Plan) -> int:
    """Return how many numbers a plan reads."""
    sources = {move.source for move in plan.written}
    return sum(prod(plan.source.tensors[name].shape) for name in sources)


class StoredWeights(Weights):
    """The weights that a plan reads, in float32, with q and k in half_split rows."""

    def __init__(self, plan: Plan) -> None:
        self.params, self._layout = plan.ready()
        self._tensors = plan.source.tensors
        self._moves: dict[Place, Move] = {move.place: move for move in plan.written}
        # A tied head that is not stored is the embedding.
        self._moves.setdefault(("output", None), self._moves["tok_embeddings", None])
        self.n_parameters = count_parameters(plan)
        self._kept: dict[str, Tensor] = {}
        self._buffers: dict[str, tuple[TensorBuffer, TensorBuffer]] = {}
        if self.is_kept:
            for move in self._moves.values():
                self._kept.setdefault(move.source, self._read(move))

    @property
    def is_kept(self) -> bool:
        """Whether all weights are in memory."""
        return 4 * self.n_parameters <= MOST_KEPT

    @property
    def places(self) -> Collection[Place]:
        """The role and layer of every weight."""
        return self._moves.keys()

    def __getitem__(self, place: Place) -> Tensor:
        move = self._moves[place]
        return self._kept[move.source] if self.is_kept else self._read(move)

    def __iter__(self) -> Iterator[Place]:
        return iter(self._moves)

    def __len__(self) -> int:
        return len(self._moves)

    def layer(self, number: int) -> dict[str, Tensor]:
        """Return the weights of a layer by role; those of a large model until the next call."""
        roles = layer_roles(self.places, number)
        if self.is_kept:
            return {role: self[role, number] for role in roles}
        return {role: self._read(self._moves[role, number], self._memory(role)) for role in roles}

    def rows(self, role: str, runs: Sequence[tuple[int, int]]) -> Tensor:
        """Return runs of rows (first, last) of the embedding or the output matrix, one tensor."""
        move = self._moves[role, None]
        if self.is_kept:
            return torch.cat([self._kept[move.source][first:last] for first, last in runs])
        info = self._tensors[move.source]
        with PieceReader() as reader:
            return torch.cat([read_rows(reader, info, *run) for run in runs]).float()

    def next_rows(self, role: str, first: int, last: int) -> Tensor:
        """Return rows of such a matrix; those of a large model until the next call."""
        move = self._moves[role, None]
        if self.is_kept:
            return self._kept[move.source][first:last]
        return self._read_rows(move, first, last, self._memory(role))

    def _memory(self, role: str) -> tuple[TensorBuffer, TensorBuffer]:
        """Return memory for the rows as stored and in float32: new memory takes as long to get."""
        return self._buffers.setdefault(role, (TensorBuffer(), TensorBuffer()))

    def _read(self, move: Move, memory: tuple[TensorBuffer, TensorBuffer] | None = None) -> Tensor:
        rows = self._read_rows(move, 0, self._tensors[move.source].n_rows, memory)
        if move.role and (n_heads := move.role.n_heads(self.params)):
            rows = rope.relayout(rows, n_heads, self._layout, "half_split")
        return rows

    def _read_rows(
        self, move: Move, first: int, last: int, memory: tuple[TensorBuffer, TensorBuffer] | None
    ) -> Tensor:
        stored, as_float = memory or (TensorBuffer(), TensorBuffer())
        with PieceReader() as reader:
            rows = read_rows(reader, self._tensors[move.source], first, last, stored)
        return as_float.tensor(rows.shape, torch.float32).copy_(rows)


class ReorderedWeights(Weights):
    """Other weights as a variant leaves them, reordered when they are asked for."""

    def __init__(self, weights: Weights, variant: ReorderVariant, params: LlamaParams) -> None:
        self._weights, self._variant, self._params = weights, variant, params

    def __getitem__(self, place: Place) -> Tensor:
        return self._variant.apply(place[0], self._weights[place], self._params)

    def __iter__(self) -> Iterator[Place]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)
