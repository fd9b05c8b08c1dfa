"""What each TorchTitan release expects: names, flags, flavours, RoPE scaling.

The one place for facts of a release, read in the wheels 0.1.0, 0.2.2 and 0.3.0 and run on the
last two. A checkpoint cannot carry RoPE's base or scaling: the model that TorchTitan builds
decides. `advice` makes commands of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from llamaconv.family import LLAMA_3_THETA, LLAMA_31_SCALING, PUBLISHED
from llamaconv.keys import Layout
from llamaconv.params import LlamaParams, RopeScaling
from llamaconv.tables import Table

# The scaling of every stock flavour of 0.2.x and 0.3.0; 0.1.0 has none.
STOCK_SCALING = LLAMA_31_SCALING


@dataclass(frozen=True)
class Flavour:
    """One of TorchTitan's stock Llama 3 models; theta 500000 and eps 1e-5 in all of them."""

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
        names = ("dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "vocab_size", "tied")
        return (
            all(getattr(params, name) == getattr(self, name) for name in names)
            and params.q_rows == params.dim
            and params.rope_theta == LLAMA_3_THETA
            and params.norm_eps == 1e-5
        )


def _flavour(model: str) -> Flavour:
    """The flavour with the sizes of a published model, named by its size."""
    one = next(one for one in PUBLISHED if one.name == model)
    sizes = (one.dim, one.n_layers, one.n_heads, one.n_kv_heads, one.ffn_dim, one.vocab_size)
    return Flavour(model.split()[-1], *sizes, tied=one.tied)


FLAVOURS = (
    *map(_flavour, ("Llama 3.2 1B", "Llama 3.2 3B", "Llama 3.1 8B", "Llama 3.1 70B")),
    _flavour("Llama 3.1 405B"),
    Flavour("debugmodel", 256, 6, 16, 16, 768, vocab_size=2048),
)


@dataclass(frozen=True)
class Release:
    """One release: the generation of names it reads, its flags, and what its models can be.

    ``flavours`` are those that a flag chooses (0.3.0 defines 1B and 3B, but no configuration
    for them). ``tied`` and ``wide_heads`` say whether its Llama can be so. ``data`` says where
    it takes tokenizer and text from.
    """

    version: str
    generation: str
    flavours: tuple[str, ...]
    scaling: RopeScaling | None
    tied: bool
    wide_heads: bool
    enable: str
    dump_folder: str
    choose: str
    define: str
    data: str


_STOCK = ("8B", "70B", "405B", "debugmodel")
_OLD_CHOOSE = "--model.name llama3 --model.flavor {flavour}"
_OLD_DEFINE = f"{_OLD_CHOOSE} --experimental.custom_import converted_llama"

# Newest first of each generation.
RELEASES = (
    Release(
        version="0.3.0",
        generation="titan-0.3",
        flavours=_STOCK,
        scaling=STOCK_SCALING,
        tied=True,
        wide_heads=True,
        enable="--checkpoint.enable",
        dump_folder="--dump_folder",
        choose="--module llama3 --config llama3_{flavour}",
        define="--module converted_llama --config {flavour}",
        data="the tokenizer is read from --hf_assets_path DIR, the text from the Hub; a local one "
        "is --dataloader.dataset c4_test --dataloader.dataset_path DIR",
    ),
    Release(
        version="0.2.2",
        generation="titan-0.2",
        flavours=_STOCK,
        scaling=STOCK_SCALING,
        tied=False,
        wide_heads=False,
        enable="--checkpoint.enable",
        dump_folder="--job.dump_folder",
        choose=_OLD_CHOOSE,
        define=_OLD_DEFINE,
        data="the tokenizer is read from --model.hf_assets_path DIR, the text from "
        "--training.dataset_path DIR",
    ),
    Release(
        version="0.1.0",
        generation="titan-0.2",
        flavours=_STOCK[:3],
        scaling=None,
        tied=False,
        wide_heads=False,
        enable="--checkpoint.enable_checkpoint",
        dump_folder="--job.dump_folder",
        choose=_OLD_CHOOSE,
        define=_OLD_DEFINE,
        data="the tokenizer is a tiktoken file, --model.tokenizer_path FILE, and this release takes "
        "the vocabulary from it: it has to have {vocab_size} entries",
    ),
)


def releases_of(generation: str) -> tuple[Release, ...]:
    """The releases that read the names of ``generation``, newest first; none for titan-2024."""
    return tuple(release for release in RELEASES if release.generation == generation)


def flavour_of_shapes(params: LlamaParams) -> Flavour | None:
    """The flavour with these shapes, base and eps, whatever its RoPE scaling."""
    return next((flavour for flavour in FLAVOURS if flavour.fits(params)), None)


def stock_flavour(params: LlamaParams, release: Release) -> Flavour | None:
    """The flavour with exactly these parameters, RoPE scaling included."""
    near = flavour_of_shapes(params)
    chosen = near is not None and near.name in release.flavours
    return near if chosen and params.rope_scaling == release.scaling else None


def fits(params: LlamaParams, layout: Layout) -> Table:
    """For each release: the names it reads, the stock flavour that fits, or why none does."""
    rows = []
    for release in RELEASES:
        flavour = stock_flavour(params, release) if layout == "interleaved" else None
        rows.append(
            (
                release.version,
                release.generation,
                flavour.name if flavour else "none",
                "every parameter is this model's"
                if flavour
                else why_not(params, release, layout)
                or f"{_difference(params, release, layout)}; `convert` prints a module for it",
            )
        )
    columns = ("TorchTitan", "--generation", "stock flavour", "why")
    return Table(columns, rows, caption="what each release makes of this model")


def _difference(params: LlamaParams, release: Release, layout: Layout) -> str:
    near = flavour_of_shapes(params)
    if near is None:
        return "no flavour has these shapes, RoPE base and eps"
    if layout != "interleaved":
        return f"{near.name} turns interleaved pairs"
    if near.name not in release.flavours:
        return f"{near.name} has no configuration"
    stock, own = (s.factor if s else "none" for s in (release.scaling, params.rope_scaling))
    return f"{near.name} has RoPE scaling {stock}, this model {own}"


def why_not(params: LlamaParams, release: Release, layout: Layout) -> str:
    """Why the release has no such model, or nothing."""
    if params.q_rows != params.dim and not release.wide_heads:
        return (
            f"TorchTitan {release.version} has heads of dim / n_heads only, not of {params.head_dim}; "
            "use --generation titan-0.3"
        )
    if params.rope_scaling and release.scaling is None:
        return f"TorchTitan {release.version} has no RoPE scaling"
    if layout == "half_split" and (release.generation != "titan-0.3" or params.rope_scaling):
        return (
            "every stock model turns interleaved pairs; rows kept half_split need a model with a "
            "rotate-half RoPE" + (" and Llama 3 scaling" if params.rope_scaling else "")
        )
    return ""
