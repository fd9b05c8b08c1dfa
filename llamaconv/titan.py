"""What each TorchTitan release expects: names, flags, flavours, RoPE scaling.

The one place for facts of a release. They were read in the wheels 0.1.0, 0.2.2 and 0.3.0 and
run on them; a checkpoint cannot carry RoPE's base or scaling, so the flavour that trains it
has to have the same, and this says whether it does.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from llamaconv.params import LlamaParams, RopeScaling

# Newest first: names that fit several are taken for the newest.
GENERATIONS = ("titan-0.3", "titan-0.2", "titan-2024")

LLAMA_31_SCALING = RopeScaling(8.0, 1.0, 4.0, 8192)


@dataclass(frozen=True)
class Flavour:
    """One of TorchTitan's stock Llama 3 models; theta 500000, eps 1e-5 in all of them."""

    name: str
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    ffn_dim: int
    vocab_size: int = 128256
    tied: bool = False

    def fits(self, params: LlamaParams) -> bool:
        """Whether shapes, base and eps are those of ``params``; scaling is another matter."""
        same = (
            getattr(params, name) == getattr(self, name)
            for name in (
                "dim",
                "n_layers",
                "n_heads",
                "n_kv_heads",
                "ffn_dim",
                "vocab_size",
                "tied",
            )
        )
        return (
            all(same)
            and params.head_dim * params.n_heads == params.dim
            and params.rope_theta == 500000
            and abs(params.norm_eps - 1e-5) < 1e-9
        )


FLAVOURS = (
    Flavour("1B", 2048, 16, 32, 8, 8192, tied=True),
    Flavour("3B", 3072, 28, 24, 8, 8192, tied=True),
    Flavour("8B", 4096, 32, 32, 8, 14336),
    Flavour("70B", 8192, 80, 64, 8, 28672),
    Flavour("405B", 16384, 126, 128, 8, 53248),
    Flavour("debugmodel", 256, 6, 16, 16, 768, vocab_size=2048),
)


@dataclass(frozen=True)
class Release:
    """How one release is told to load a checkpoint. ``flavours`` are those that it has."""

    name: str
    versions: str
    flavours: tuple[str, ...]
    scaling: RopeScaling | None

    def command(self, flavour: str, checkpoint: Path | None) -> str:
        """The command that starts training; no path where ``step-0`` lies in the dump folder."""
        if self.name == "titan-0.3":
            # 0.3.0 has 1B and 3B as models but no configuration for them.
            model = f"--module llama3 --config llama3_{flavour.lower()}"
        else:
            model = f"--model.name llama3 --model.flavor {flavour}"
        words = f"torchrun --nproc-per-node 8 -m torchtitan.train {model} --checkpoint.enable"
        if checkpoint is not None:
            words += f" --checkpoint.initial_load_path {shlex.quote(str(checkpoint))}"
        return words


RELEASES = {
    "titan-0.3": Release(
        "titan-0.3",
        "0.3.0",
        ("1B", "3B", "8B", "70B", "405B", "debugmodel"),
        LLAMA_31_SCALING,
    ),
    "titan-0.2": Release(
        "titan-0.2", "0.2.0 to 0.2.2", ("8B", "70B", "405B", "debugmodel"), LLAMA_31_SCALING
    ),
}


@dataclass(frozen=True)
class Advice:
    """How to train from a checkpoint: the command, and what to mind before."""

    command: str
    notes: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([self.command, *(f"note: {note}" for note in self.notes)])


def flavour_of(params: LlamaParams, release: Release) -> Flavour | None:
    """The stock flavour of a release that fits, or None."""
    for flavour in FLAVOURS:
        if flavour.name in release.flavours and flavour.fits(params):
            return flavour
    return None


def advice(
    params: LlamaParams,
    generation: str,
    rope: str,
    checkpoint: Path | None,
    dump_folder: Path | None = None,
) -> Advice:
    """How to start training from a converted checkpoint.

    ``checkpoint`` is its folder; None says that it lies at ``step-0`` of ``dump_folder``.
    """
    return Advice("", ())
