"""What each TorchTitan release expects: names, flags, flavours, RoPE scaling.

The only place for facts about a release. They were read in the wheels 0.1.0, 0.2.2 and 0.3.0, and
run on the last two. A checkpoint cannot contain RoPE's base or scaling: the model that TorchTitan
builds decides. `advice` turns the facts into commands.
"""

from __future__ import annotations

from dataclasses import dataclass

from llamaconv.model.names import Layout
from llamaconv.model.params import LlamaParams, RopeScaling
from llamaconv.model.published import LLAMA_3_THETA, LLAMA_31_SCALING, PUBLISHED
from llamaconv.report.tables import Table

# The scaling of every stock flavour of 0.2.x and 0.3.0; 0.1.0 has none.
STOCK_SCALING = LLAMA_31_SCALING

IN_HUGGINGFACE = "--checkpoint.initial_load_in_hf"
"""The flag with which a release starts from a Hugging Face folder."""


@dataclass(frozen=True)
class Flavour:
    """One of TorchTitan's stock Llama 3 models. All have RoPE base 500000 and eps 1e-5."""

    name: str
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    ffn_dim: int
    vocab_size: int = 128256
    tied: bool = False

    def fits(self, params: LlamaParams) -> bool:
        """Return whether shapes, RoPE base and eps are those of ``params``, whatever the scaling."""
        names = ("dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "vocab_size", "tied")
        return (
            all(getattr(params, name) == getattr(self, name) for name in names)
            and params.q_rows == params.dim
            and params.rope_theta == LLAMA_3_THETA
            and params.norm_eps == 1e-5
        )


def _flavour(model: str) -> Flavour:
    """Return the flavour with the sizes of a published model, named by its size."""
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
    """One release of TorchTitan.

    Attributes:
        version: The release.
        generation: The tensor names that it reads.
        flavours: The flavours that a flag chooses (0.3.0 also defines 1B and 3B, but has no
            configuration for them).
        scaling: The RoPE scaling of its stock flavours.
        tied: Whether its Llama can tie the head to the embedding.
        wide_heads: Whether its heads can differ from ``dim / n_heads``.
        enable: The flag that turns checkpoints on.
        full: The flag with which a path is loaded as a full checkpoint, not as a model alone; empty
            if its own full checkpoints have other names than llamaconv's.
        dump_folder: The flag that names the dump folder.
        choose: The flags that choose a stock flavour.
        define: The flags that use a model of our own module.
        tokenizer: The flag that names the tokenizer.
        tokenizer_is: What the flag names, "folder" or "file".
        tokenizer_files: The files in the tokenizer's folder of which it needs one.
        text_flags: The flags that choose a text that the release can find by itself.
        text: Where it takes the text from, and what else to know about it.
        reads_huggingface: Whether a stock flavour can start from a Hugging Face folder.
        ignores_path: Whether it trains from random weights if its dump folder holds an empty
            ``checkpoint`` folder, whatever path it is given.
    """

    version: str
    generation: str
    flavours: tuple[str, ...]
    scaling: RopeScaling | None
    tied: bool
    wide_heads: bool
    enable: str
    full: str
    dump_folder: str
    choose: str
    define: str
    tokenizer: str
    tokenizer_is: str
    tokenizer_files: tuple[str, ...]
    text_flags: str
    text: str
    reads_huggingface: bool
    ignores_path: bool


_STOCK = ("8B", "70B", "405B", "debugmodel")
# What its reader of tokenizers looks for.
_FAST_TOKENIZER = ("tokenizer.json", "vocab.json", "vocab.txt")
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
        full="--checkpoint.no_initial_load_model_only",
        dump_folder="--dump_folder",
        choose="--module llama3 --config llama3_{flavour}",
        define="--module converted_llama --config {flavour}",
        tokenizer="--hf_assets_path",
        tokenizer_is="folder",
        tokenizer_files=_FAST_TOKENIZER,
        text_flags="",
        text="the text is read from the Hub; a local one is --dataloader.dataset c4_test "
        "--dataloader.dataset_path DIR",
        reads_huggingface=True,
        ignores_path=False,
    ),
    Release(
        version="0.2.2",
        generation="titan-0.2",
        flavours=_STOCK,
        scaling=STOCK_SCALING,
        tied=False,
        wide_heads=False,
        enable="--checkpoint.enable",
        full="--checkpoint.no_initial_load_model_only",
        dump_folder="--job.dump_folder",
        choose=_OLD_CHOOSE,
        define=_OLD_DEFINE,
        tokenizer="--model.hf_assets_path",
        tokenizer_is="folder",
        tokenizer_files=_FAST_TOKENIZER,
        text_flags="--training.dataset c4",
        text="the text is read from the Hub; a local one is --training.dataset c4_test "
        "--training.dataset_path DIR",
        reads_huggingface=True,
        ignores_path=True,
    ),
    Release(
        version="0.1.0",
        generation="titan-0.2",
        flavours=_STOCK[:3],
        scaling=None,
        tied=False,
        wide_heads=False,
        enable="--checkpoint.enable_checkpoint",
        full="",
        dump_folder="--job.dump_folder",
        choose=_OLD_CHOOSE,
        define=_OLD_DEFINE,
        tokenizer="--model.tokenizer_path",
        tokenizer_is="file",
        tokenizer_files=("tokenizer.model",),
        text_flags="--training.dataset c4",
        text="the tokenizer is a tiktoken file, and this release takes the vocabulary from it: it "
        "must have {vocab_size} entries",
        reads_huggingface=False,
        ignores_path=True,
    ),
)


UNRELEASED = {
    "titan-main": "pytorch/torchtitan's main branch since 2026-09-21 (#4808, #4815)",
}
"""What reads the generations that no release reads."""


def releases_of(generation: str) -> tuple[Release, ...]:
    """Return the releases that read names of ``generation``, newest first.

    There is none for titan-2024, nor for titan-main yet.
    """
    return tuple(release for release in RELEASES if release.generation == generation)


def flavour_of_shapes(params: LlamaParams) -> Flavour | None:
    """Return the flavour with these shapes, base and eps, whatever its RoPE scaling."""
    return next((flavour for flavour in FLAVOURS if flavour.fits(params)), None)


def stock_flavour(params: LlamaParams, release: Release) -> Flavour | None:
    """Return the flavour with exactly these parameters, RoPE scaling included."""
    near = flavour_of_shapes(params)
    chosen = near is not None and near.name in release.flavours
    return near if chosen and params.rope_scaling == release.scaling else None


def fits(params: LlamaParams, layout: Layout, is_huggingface: bool = False) -> Table:
    """Return one row per release: the names it reads, and the stock flavour or why none fits.

    The last row is about the main branch, whose flavours were not run.

    Args:
        params: The model.
        layout: The layout of the q and k rows of the DCP.
        is_huggingface: Whether the source is a Hugging Face folder that a release can read too.
    """
    rows = []
    for release in RELEASES:
        flavour = stock_flavour(params, release) if layout == "interleaved" else None
        rows.append(
            (
                release.version,
                release.generation,
                flavour.name if flavour else "none",
                _fitting(release, is_huggingface)
                if flavour
                else why_not(params, release, layout)
                or f"{_difference(params, release, layout)}; `convert` writes a module for it",
            )
        )
    rows += [
        ("main", generation, "not known", f"{what}; in no release yet, read and not run")
        for generation, what in UNRELEASED.items()
    ]
    columns = ("TorchTitan", "--generation", "stock flavour", "why")
    return Table(columns, rows, caption="what each release makes of this model")


def _fitting(release: Release, is_huggingface: bool) -> str:
    reads = is_huggingface and release.reads_huggingface
    return "every parameter is this model's" + (
        f"; no conversion is needed, {IN_HUGGINGFACE} loads the source" if reads else ""
    )


def _difference(params: LlamaParams, release: Release, layout: Layout) -> str:
    near = flavour_of_shapes(params)
    if near is None:
        return "no flavour has these shapes, RoPE base and eps"
    if layout != "interleaved":
        return f"{near.name} rotates interleaved pairs"
    if near.name not in release.flavours:
        return f"{near.name} has no configuration"
    stock, own = (s.factor if s else "none" for s in (release.scaling, params.rope_scaling))
    return f"{near.name} has RoPE scaling {stock}, this model {own}"


def why_not(params: LlamaParams, release: Release, layout: Layout) -> str:
    """Return why the release has no such model; empty if it has."""
    if params.q_rows != params.dim and not release.wide_heads:
        return (
            f"TorchTitan {release.version} has heads of dim / n_heads only, not of {params.head_dim}; "
            "use --generation titan-0.3"
        )
    if params.rope_scaling and release.scaling is None:
        return f"TorchTitan {release.version} has no RoPE scaling"
    if layout == "half_split" and (release.generation != "titan-0.3" or params.rope_scaling):
        return (
            "every stock model rotates interleaved pairs; half_split rows need a model with a "
            "rotate-half RoPE"
            + (" that scales, and CosSinRoPE has no such scaling" if params.rope_scaling else "")
        )
    return ""
