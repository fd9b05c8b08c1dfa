"""What right and wrong weights do with text: losses, by position too, and continuations.

The loss is the mean cross-entropy of the next token in nats; the windows of text are those of
the specimen.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from llamaconv import model
from llamaconv.keys import Layout
from llamaconv.lesson.specimen import Specimen, Weights
from llamaconv.lesson.ways import ways
from llamaconv.params import LlamaParams, RopeScaling
from llamaconv.tables import Table
from llamaconv.threads import one_thread

# Logits of the two layouts differ only by the rounding of float32 sums, layer upon layer.
ROUNDING_OF_LOGITS = 1e-3


@dataclass(frozen=True, repr=False)
class Losses:
    """Mean loss at each position, ``(positions,)``, by the name of what was run.

    Position p is the loss of token p + 1, which sees p + 1 tokens.
    """

    by_name: dict[str, Tensor]
    unit: str

    def mean(self, name: str) -> float:
        """Nats a token over the whole text."""
        return self.by_name[name].mean().item()

    @property
    def means(self) -> dict[str, float]:
        return {name: self.mean(name) for name in self.by_name}

    def table(self) -> Table:
        rows = [(name, f"{mean:.1f}") for name, mean in self.means.items()]
        column = f"loss, nats a {self.unit}"
        return Table(("weights", column), rows, right=(column,))

    def __repr__(self) -> str:
        return f"<Losses: {', '.join(f'{name} {mean:.1f}' for name, mean in self.means.items())}>"

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def losses(specimen: Specimen) -> Losses:
    """The right way and every wrong one, all with the interleaved rotation."""
    return Losses(
        {
            way.name: _by_position(specimen, specimen.gone(way), "interleaved")
            for way in ways(specimen.params)
        },
        specimen.unit,
    )


def losses_by_layout(specimen: Specimen) -> Losses:
    """Rows of both layouts with both rotations: four runs, named ``rows rows, rotation rotation``."""
    layouts: tuple[Layout, Layout] = ("half_split", "interleaved")
    return Losses(
        {
            f"{rows} rows, {rotation} rotation": _by_position(
                specimen, getattr(specimen, rows), rotation
            )
            for rows in layouts
            for rotation in layouts
        },
        specimen.unit,
    )


@dataclass(frozen=True, repr=False)
class WaysOut:
    """The two right pairings of rows and rotation, run on one window of text.

    ``losses`` are nats a token, ``logits`` the largest difference between the two in units of
    the largest logit.
    """

    losses: dict[str, float]
    logits: float
    unit: str

    @property
    def agree(self) -> bool:
        """Whether the two differ by rounding only."""
        one, other = self.losses.values()
        return self.logits < ROUNDING_OF_LOGITS and abs(one - other) < ROUNDING_OF_LOGITS * (
            1 + one
        )

    def table(self) -> Table:
        column = f"loss, nats a {self.unit}"
        rows = [(name, f"{loss:.2f}") for name, loss in self.losses.items()]
        small = self.logits < ROUNDING_OF_LOGITS
        shown = f"less than {ROUNDING_OF_LOGITS:g}" if small else f"{self.logits:.1g}"
        caption = f"largest difference of the logits, relative: {shown}"
        return Table(("way out", column), rows, caption=caption, right=(column,))

    def __repr__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def ways_out(specimen: Specimen) -> WaysOut:
    """Interleaved rows with the original rotation, half_split rows with rotate-half."""
    tokens_1P = specimen.tokens[:1]
    runs: list[tuple[Weights, Layout]] = [
        (specimen.interleaved, "interleaved"),
        (specimen.half_split, "half_split"),
    ]
    with torch.no_grad():
        woven, split = (
            model.forward(weights, specimen.params, tokens_1P, layout) for weights, layout in runs
        )
    return WaysOut(
        {
            "rows re-ordered to interleaved, the original rotation": model.loss(
                woven, tokens_1P
            ).item(),
            "rows left half_split, a rotate-half rotation": model.loss(split, tokens_1P).item(),
        },
        ((woven - split).abs().max() / split.abs().max()).item(),
        specimen.unit,
    )


def stretched_losses(specimen: Specimen, factor: float = 8.0) -> Losses:
    """As trained, and with Llama 3's scaling put in that the model was not trained with.

    The original length is that of the specimen's windows, as Llama 3.1's is that of Llama 3.
    """
    scaling = RopeScaling(factor, 1.0, 4.0, specimen.tokens.shape[1])
    other = replace(specimen.params, rope_scaling=scaling)
    rows: Weights = specimen.half_split
    return Losses(
        {
            "as trained": _by_position(specimen, rows, "half_split"),
            f"with factor {factor:g}": _by_position(specimen, rows, "half_split", other),
        },
        specimen.unit,
    )


def _by_position(
    specimen: Specimen, weights: Weights, layout: Layout, params: LlamaParams | None = None
) -> Tensor:
    tokens_WP = specimen.tokens
    with torch.no_grad():
        logits_WPV = model.forward(weights, params or specimen.params, tokens_WP, layout)
    loss = F.cross_entropy(
        logits_WPV[:, :-1].flatten(0, 1), tokens_WP[:, 1:].flatten(), reduction="none"
    )
    return loss.view(len(tokens_WP), -1).mean(0)


def continuations(
    specimen: Specimen, prompt: str = 'Return "True" if *x* is in ', length: int = 40
) -> Table:
    """The most likely next token again and again, for the right way and every wrong one."""
    tokens = torch.tensor(list(prompt.encode())) % specimen.params.vocab_size
    length = min(length, (specimen.params.max_position or 2**30) - len(tokens))
    rows = [
        (way.name, _text(specimen, continued(specimen, specimen.gone(way), tokens, length)))
        for way in ways(specimen.params)
    ]
    columns = ("weights", "continued")
    return Table(columns, rows, caption=f"{prompt.strip()} …")


def continued(
    specimen: Specimen,
    weights: Weights,
    tokens_P: Tensor,
    length: int,
    layout: Layout = "interleaved",
) -> list[int]:
    """The ``length`` tokens that follow, each the most likely one."""
    tokens_1P = tokens_P[None]
    # Products of a few kB: threads would wait for each other longer than they work.
    with torch.no_grad(), one_thread():
        for _ in range(length):
            logits_V = model.forward(weights, specimen.params, tokens_1P, layout)[0, -1]
            tokens_1P = torch.cat([tokens_1P, logits_V.argmax().view(1, 1)], dim=1)
    return tokens_1P[0, len(tokens_P) :].tolist()


def _text(specimen: Specimen, tokens: list[int]) -> str:
    if not specimen.reads_bytes:
        return " ".join(map(str, tokens))
    return bytes(tokens).decode(errors="replace").replace("\n", "⏎")
