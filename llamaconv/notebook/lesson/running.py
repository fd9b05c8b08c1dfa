"""Running a specimen in several ways at once, one layer at a time.

All runs go through a layer before the next layer is read, so that its weights are read once. The
product with the vocabulary is computed for some tokens of the vocabulary at a time. The result is
that of `forward.forward`.

Shapes: W windows of text, B texts, P positions, N = B·P, C width of the model, V tokens of the
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from llamaconv.checkpoint.torch_rows import one_thread
from llamaconv.model import forward, rope
from llamaconv.model.names import Layout
from llamaconv.model.params import LlamaParams, RopeScaling
from llamaconv.notebook.lesson.specimen import Specimen
from llamaconv.notebook.lesson.variants import ReorderVariant, variants
from llamaconv.report.progress import Steps

# Tokens of text that go through a layer together, for each run.
_MOST_TOKENS = 2048
# Tokens of all runs that are computed together.
_FEW_TOKENS = 512
# Windows that are read first, to find out whether the model shows anything.
FIRST_WINDOWS = 4
# Bytes of the rows of the vocabulary that are in memory.
_HEAD_BYTES = 16_000_000


@dataclass(frozen=True)
class Run:
    """One way to run a specimen.

    Attributes:
        variant: How q and k are reordered.
        layout: The layout of the rotation.
        scaling: A scaling of the rotation that replaces the model's own.
    """

    variant: ReorderVariant
    layout: Layout = "interleaved"
    scaling: RopeScaling | None = None


@dataclass
class Batch:
    """Several runs on their way through the layers, on the same number of texts each.

    Attributes:
        runs: The runs, R of them.
        x: The output of the last layer that was computed (R·B, P, C).
        n_layers: How many layers were computed.
        past: For each layer, k and v of earlier positions; None to keep none.
        attention: For each layer, the probabilities (R·B, H, P, P); None to keep none.
    """

    runs: Sequence[Run]
    x: Tensor
    n_layers: int = 0
    past: list[list[Tensor]] | None = None
    attention: list[Tensor] | None = None


@dataclass(frozen=True)
class Outcome:
    """What one run does to the text.

    Attributes:
        loss: The loss of the next token (W, P - 1) in nats. Entry p is the loss of token p + 1,
            which the model predicts from p + 1 tokens.
        best: The most likely next token at each position (W, P).
    """

    loss: Tensor = field(repr=False)
    best: Tensor = field(repr=False)


def runs_of_variants(specimen: Specimen) -> dict[str, Run]:
    """Return a run of every variant with the interleaved rotation, the right one first."""
    return {one.name: Run(one) for one in variants(specimen.params)}


def through_layers(
    specimen: Specimen, batch: Batch, n_layers: int, steps: Steps, first: int = 0
) -> None:
    """Take a batch through layers until ``n_layers`` are done.

    Args:
        specimen: The model.
        batch: The runs; it is changed.
        n_layers: The layers that are done in the end.
        steps: Counts one step per layer.
        first: The position of the first token of each text.
    """
    groups = _groups(batch)
    n_positions = batch.x.shape[1]
    rotations = [_rotation(specimen.params, runs, n_positions, first) for runs in groups]
    for layer in range(batch.n_layers, n_layers):
        weights = specimen.half_split.layer(layer)
        past = None if batch.past is None else batch.past[layer]
        parts = [
            forward.block(weights, specimen.params, x, rotate, batch.attention, past)
            for x, rotate in zip(batch.x.chunk(len(groups)), rotations, strict=True)
        ]
        batch.x = torch.cat(parts)
        batch.n_layers = layer + 1
        steps.add()


def _groups(batch: Batch) -> list[Sequence[Run]]:
    """Return the runs that are computed together.

    A product for all runs reads the weights of a layer once, which counts if there are few tokens.
    With many tokens, the results of a single run are large enough.
    """
    keeps = batch.past is not None or batch.attention is not None
    few = batch.x.shape[0] * batch.x.shape[1] <= _FEW_TOKENS
    return [batch.runs] if keeps or few else [[run] for run in batch.runs]


def _rotation(
    params: LlamaParams, runs: Sequence[Run], n_positions: int, first: int
) -> Callable[[Tensor, str], Tensor]:
    """Return the rotation of a batch. Reordering x·wq is the same as reordering wq."""
    angles = [
        forward.angles(
            replace(params, rope_scaling=run.scaling or params.rope_scaling), n_positions, first
        )
        for run in runs
    ]

    def rotate(x: Tensor, role: str) -> Tensor:
        made = []
        for run, angles_PF, x_BPHD in zip(runs, angles, x.chunk(len(runs)), strict=True):
            rows = run.variant.apply(role, x_BPHD.flatten(2).movedim(-1, 0), params)
            made.append(
                rope.rotate(rows.movedim(0, -1).reshape(x_BPHD.shape), angles_PF, run.layout)
            )
        return torch.cat(made)

    return rotate


def vocabulary(specimen: Specimen) -> Iterator[tuple[int, Tensor]]:
    """Yield the number of a token, and the rows of the output matrix from there on (V, C)."""
    params = specimen.params
    step = _vocabulary_step(params)
    for first in range(0, params.vocab_size, step):
        last = min(first + step, params.vocab_size)
        yield first, specimen.half_split.next_rows("output", first, last)


def _vocabulary_step(params: LlamaParams) -> int:
    return max(1, _HEAD_BYTES // (4 * params.dim))


def normed(specimen: Specimen, x: Tensor) -> Tensor:
    """Return the output of the last layer (..., C) as the output matrix takes it."""
    return forward.norm(x, specimen.half_split["norm", None], specimen.params)


def outcomes_of(
    specimen: Specimen, runs: Sequence[Run], n_windows: int | None = None
) -> list[Outcome]:
    """Return what each run does to the first windows of the text; nothing is computed twice.

    Args:
        specimen: The model and the text.
        runs: The runs.
        n_windows: How many windows; all of them if None.
    """
    chunks = _chunks(specimen, n_windows)
    missing = [
        (chunk, [run for run in runs if (run, chunk) not in specimen.cache]) for chunk in chunks
    ]
    params = specimen.params
    parts = params.n_layers + -(-params.vocab_size // _vocabulary_step(params))
    total = sum(bool(left) for _, left in missing) * parts
    what = f"running {len(runs)} variants on {int(specimen.tokens.numel())} {specimen.unit}s"
    with torch.no_grad(), Steps(what, total, specimen.is_slow) as steps:
        for chunk, left in missing:
            if left:
                found = _compute(specimen, left, specimen.tokens[slice(*chunk)], steps)
                specimen.cache.update(zip([(run, chunk) for run in left], found, strict=True))
    return [
        Outcome(
            torch.cat([specimen.cache[run, chunk].loss for chunk in chunks]),
            torch.cat([specimen.cache[run, chunk].best for chunk in chunks]),
        )
        for run in runs
    ]


def _chunks(specimen: Specimen, n_windows: int | None) -> list[tuple[int, int]]:
    """Return the first windows, then groups of as many as are run together."""
    every, length = specimen.tokens.shape
    step = max(1, _MOST_TOKENS // length)
    starts = [0, *range(min(FIRST_WINDOWS, every), every, step)]
    chunks = list(zip(starts, [*starts[1:], every], strict=True))
    return [chunk for chunk in chunks if n_windows is None or chunk[0] < n_windows]


def _compute(
    specimen: Specimen, runs: Sequence[Run], tokens_WP: Tensor, steps: Steps
) -> list[Outcome]:
    x_NPC = specimen.embedded(tokens_WP).repeat(len(runs), 1, 1)
    batch = Batch(runs, x_NPC)
    through_layers(specimen, batch, specimen.params.n_layers, steps)
    per_run = normed(specimen, batch.x).chunk(len(runs))
    targets_WP = tokens_WP.roll(-1, dims=1)
    total = torch.full((len(runs), *tokens_WP.shape), float("-inf"))
    highest, of_target = total.clone(), total.clone()
    best = torch.zeros_like(total, dtype=torch.long)
    for first, rows_VC in vocabulary(specimen):
        place_WP = targets_WP - first
        here_WP = (place_WP >= 0) & (place_WP < len(rows_VC))
        place_WP1 = place_WP.clamp(0, len(rows_VC) - 1)[..., None]
        for at, x_WPC in enumerate(per_run):
            logits_WPV = x_WPC @ rows_VC.T
            value_WP, token_WP = logits_WPV.max(-1)
            best[at] = torch.where(value_WP > highest[at], token_WP + first, best[at])
            highest[at] = highest[at].maximum(value_WP)
            total[at] = total[at].logaddexp(logits_WPV.logsumexp(-1))
            chosen_WP = logits_WPV.gather(-1, place_WP1)[..., 0]
            of_target[at] = torch.where(here_WP, chosen_WP, of_target[at])
        steps.add()
    loss = (total - of_target)[:, :, :-1]
    return [Outcome(loss[at], best[at]) for at in range(len(runs))]


def continued(
    specimen: Specimen, runs: Sequence[Run], tokens: Sequence[int], length: int
) -> list[list[int]]:
    """Return for each run the ``length`` tokens that follow, each the most likely one.

    Args:
        specimen: The model.
        runs: The runs.
        tokens: The prompt, with one token or more.
        length: How many tokens to add.
    """
    n_layers = specimen.params.n_layers
    past: list[list[Tensor]] = [[] for _ in range(n_layers)]
    made: list[Tensor] = []
    read_RP = torch.tensor([list(tokens)] * len(runs))
    what = f"writing {length} {specimen.unit}s with {len(runs)} variants"
    # Products of a few kB: several threads would wait for each other longer than they work.
    threads = nullcontext() if specimen.is_large else one_thread()
    with torch.no_grad(), threads, Steps(what, length * n_layers, specimen.is_slow) as steps:
        for at in range(length):
            batch = Batch(runs, specimen.embedded(read_RP), past=past)
            first = len(tokens) + at - read_RP.shape[1]
            through_layers(specimen, batch, n_layers, steps, first)
            made.append(_most_likely(specimen, normed(specimen, batch.x[:, -1])))
            read_RP = made[-1][:, None]
    return torch.stack(made, 1).tolist() if made else [[] for _ in runs]


def _most_likely(specimen: Specimen, x_RC: Tensor) -> Tensor:
    """Return the most likely token after each of ``x_RC`` (R,)."""
    highest = torch.full((len(x_RC),), float("-inf"))
    best = torch.zeros(len(x_RC), dtype=torch.long)
    for first, rows_VC in vocabulary(specimen):
        value_R, token_R = (x_RC @ rows_VC.T).max(-1)
        best = torch.where(value_R > highest, token_R + first, best)
        highest = highest.maximum(value_R)
    return best
