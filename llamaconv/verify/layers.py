"""Run two checkpoints a layer at a time, and find the first layer that diverges.

Both sides compute a short text in float32, each with its own parameters and the rotation of its own
layout. Weights are read a window of rows at a time and multiplied at once, so memory does not grow
with the model: an 8B is compared by its logits on a laptop.

Each layer of the second side runs twice: on its own input, which shows what has added up, and on
the first side's input, which shows what this layer does by itself.

The concession: tokens are the bytes of the sample's held-out text, whatever the tokenizer.

Shape suffixes: B runs, P positions, C width of the model, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from math import isfinite
from typing import Any, cast

import torch
from torch import Tensor

from llamaconv.checkpoint.reader import PieceReader
from llamaconv.checkpoint.tensors import TensorInfo
from llamaconv.checkpoint.torch_rows import TensorBuffer, read_rows
from llamaconv.model import forward, rope
from llamaconv.model.names import Layout, every_role
from llamaconv.model.params import SIZES, LlamaParams
from llamaconv.report.errors import RefusedError, first_few
from llamaconv.report.progress import Progress, no_progress
from llamaconv.sample import held_out_text
from llamaconv.verify.layers_run import LayersRun, Stage
from llamaconv.verify.sides import Side

_WINDOW_BYTES = 8 << 20
_N_TOKENS = 16
# What is read and multiplied to estimate the time of the whole run.
_TRIAL_BYTES = 64 << 20


class _Streamed:
    """A matrix in a file that a tensor can be multiplied by: ``x @ matrix.T``.

    `forward.block` computes nothing else with a matrix, so it runs on files unchanged.
    """

    def __init__(self, runner: _Runner, tensor: TensorInfo) -> None:
        self._runner, self._tensor = runner, tensor

    @property
    def T(self) -> _Streamed:  # noqa: N802
        """The matrix itself: `__rmatmul__` multiplies by its transpose."""
        return self

    def __rmatmul__(self, x_BPC: Tensor) -> Tensor:
        return self._runner.times(x_BPC, self._tensor)


class _Runner:
    """One side: its parameters, its layout, and the reading of its weights."""

    def __init__(self, side: Side, reader: PieceReader, add: Callable[[int], None]) -> None:
        params, layout = side.checkpoint.params, side.checkpoint.rope
        if params is None or layout is None:
            raise RefusedError(
                f"{side.checkpoint.path}: cannot be run, because no file states the model's "
                "parameters or the order of q and k rows. Pass a folder with its config.json with "
                "--assets"
            )
        self.params: LlamaParams = params
        self.layout: Layout = layout
        self._side, self._reader, self._add = side, reader, add
        self._window, self._wide = TensorBuffer(), TensorBuffer()

    def tensor(self, role: str, layer: int | None = None) -> TensorInfo:
        """Return a tensor of this side. Raises `RefusedError` if it is missing or damaged."""
        tensor = self._side.tensors.get((role, layer))
        if tensor is None and role == "output" and self.params.tied:
            return self.tensor("tok_embeddings")
        why = "is missing" if tensor is None else tensor.coverage_error()
        if tensor is None or why:
            where = f"layer {layer}: " if layer is not None else ""
            raise RefusedError(f"{self._side.checkpoint.path}: cannot be run: {where}{role} {why}")
        return tensor

    def times(self, x_BPC: Tensor, tensor: TensorInfo) -> Tensor:
        """Multiply by the transpose of a matrix, some of its rows at a time."""
        parts = []
        for first, last in tensor.windows(_WINDOW_BYTES):
            rows = self.rows(tensor, first, last)
            parts.append(x_BPC @ rows.T)
        return torch.cat(parts, -1)

    def rows(self, tensor: TensorInfo, first: int, last: int) -> Tensor:
        """Return rows in float32, valid until the next call."""
        stored = read_rows(self._reader, tensor, first, last, self._window)
        self._add((last - first) * tensor.row_bytes)
        return self._wide.tensor(stored.shape, torch.float32).copy_(stored)

    def gain(self, role: str, layer: int | None = None) -> Tensor:
        """Return a norm, which is short."""
        tensor = self.tensor(role, layer)
        return self.rows(tensor, 0, tensor.n_rows).clone()

    def embed(self, tokens: list[int]) -> Tensor:
        """Return the embedding of each token (P, C); only these rows are read."""
        tensor = self.tensor("tok_embeddings")
        return torch.cat([self.rows(tensor, token, token + 1).clone() for token in tokens])

    def block(self, layer: int, x_BPC: Tensor) -> Tensor:
        """Compute one layer."""
        angles_PF = forward.angles(self.params, x_BPC.shape[1])
        weights: dict[str, Any] = {
            role: self.gain(role, layer)
            if len(self.tensor(role, layer).shape) == 1
            else _Streamed(self, self.tensor(role, layer))
            for role in self._roles(layer)
        }

        def rotate(x_BPHD: Tensor, _role: str) -> Tensor:
            return rope.rotate(x_BPHD, angles_PF, self.layout)

        return forward.block(cast(dict[str, Tensor], weights), self.params, x_BPC, rotate)

    def _roles(self, layer: int) -> list[str]:
        """Return the roles of a layer: those that a model of this family has, and further biases."""
        needed = {role.name for role, at in every_role(self.params) if at == 0}
        stored = set(forward.layer_roles(self._side.tensors, layer))
        return [role for role in forward.LAYER_ROLES if role in needed | stored]

    def logits(self, x_BPC: Tensor) -> Tensor:
        """Return the logits (B, P, V)."""
        normed = forward.norm(x_BPC, self.gain("norm"), self.params)
        return self.times(normed, self.tensor("output"))


def run_layers(
    sides: tuple[Side, Side],
    progress: Progress = no_progress,
    announce: Callable[[str], None] | None = None,
) -> LayersRun:
    """Run both sides on the same tokens and compare them after each layer.

    Args:
        sides: Both checkpoints, as `open_sides` gives them.
        progress: Called with "read", the bytes read so far, and all bytes to read.
        announce: Called once before the run, with how long it will take.

    Raises:
        RefusedError: A side lacks a tensor or parameters, or the two have other sizes.
        FailedError: A file cannot be read.
    """
    done, total = 0, sum(_bytes_to_read(side) for side in sides)

    def add(n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        progress("read", min(done, total), total)

    with PieceReader() as reader, torch.no_grad():
        if announce is not None:
            announce(_announcement(_Runner(sides[0], reader, lambda _: None), total))
        a, b = (_Runner(side, reader, add) for side in sides)
        _check_sizes(sides, a.params, b.params)
        params = a.params
        n_tokens = max(2, min(_N_TOKENS, params.max_position or _N_TOKENS))
        tokens = [byte % params.vocab_size for byte in held_out_text()[:n_tokens]]
        x_1PC, y_PC = a.embed(tokens).unsqueeze(0), b.embed(tokens)
        stages = [Stage("embedding", apart := _relative(x_1PC[0], y_PC), apart)]
        for layer in range(params.n_layers):
            # The second side's own input, and the first side's.
            y_2PC = b.block(layer, torch.stack([y_PC, x_1PC[0]]))
            x_1PC, y_PC = a.block(layer, x_1PC), y_2PC[0]
            so_far, alone = (_relative(x_1PC[0], one) for one in (y_PC, y_2PC[1]))
            stages.append(Stage(f"layer {layer}", so_far, alone))
        logits_1PV = a.logits(x_1PC)
        other_2PV = b.logits(torch.stack([y_PC, x_1PC[0]]))
    so_far, alone = (_relative(logits_1PV[0], one) for one in other_2PV)
    stages.append(Stage("logits", so_far, alone))
    tokens_1P = torch.tensor([tokens])
    same = (logits_1PV[0].argmax(-1) == other_2PV[0].argmax(-1)).float().mean()
    losses = (forward.loss(each, tokens_1P).item() for each in (logits_1PV, other_2PV[:1]))
    one, other = (side.tensors for side in sides)
    is_cast = any(one[at].dtype != other[at].dtype for at in one.keys() & other.keys())
    return LayersRun(tuple(stages), n_tokens, float(same), (next(losses), next(losses)), is_cast)


def _bytes_to_read(side: Side) -> int:
    is_tied = ("output", None) not in side.tensors
    wanted = {*forward.LAYER_ROLES, "norm", "tok_embeddings" if is_tied else "output"}
    return sum(one.nbytes for (role, _), one in side.tensors.items() if role in wanted)


def _check_sizes(sides: tuple[Side, Side], one: LlamaParams, other: LlamaParams) -> None:
    apart = {
        size: (getattr(one, size), getattr(other, size))
        for size in SIZES
        if getattr(one, size) != getattr(other, size)
    }
    if apart:
        names = first_few(f"{size} {a} and {b}" for size, (a, b) in apart.items())
        paths = " and ".join(str(side.checkpoint.path) for side in sides)
        raise RefusedError(f"{paths}: cannot be run side by side: {names}")


def _announcement(runner: _Runner, total: int) -> str:
    """Time a part of one matrix, and say how long all will take."""
    tensor = runner.tensor("w1", 0)
    n_rows = max(1, min(tensor.n_rows, _TRIAL_BYTES // tensor.row_bytes))
    x_PC = torch.ones(2 * _N_TOKENS, tensor.shape[1])
    # The first product takes longer than all later ones.
    _ = x_PC @ runner.rows(tensor, 0, 1).T
    begun, n_bytes = time.perf_counter(), 0
    for first, last in tensor.windows(_WINDOW_BYTES, last=n_rows):
        _ = x_PC @ runner.rows(tensor, first, last).T
        n_bytes += (last - first) * tensor.row_bytes
    seconds = (time.perf_counter() - begun) * total / n_bytes
    shown = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
    return f"running {runner.params.n_layers} layers of both sides on {_N_TOKENS} tokens: about {shown}"


def _relative(one: Tensor, other: Tensor) -> float:
    """Return the norm of the difference, divided by that of ``one``."""
    apart, size = (float(torch.linalg.vector_norm(each)) for each in (other - one, one))
    if not apart:
        return 0.0
    relative = apart / size if size else float("inf")
    return relative if isfinite(relative) else float("inf")
