"""What each TorchTitan release expects: names, flags, flavours, RoPE scaling.

The only place for facts about a release. They were read in the wheels 0.1.0, 0.2.2 and 0.3.0, and
run on the last two. A checkpoint cannot contain RoPE's base or scaling: the model that TorchTitan
builds decides. `advice` turns the facts into commands.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from llamaconv.model.families import FAMILIES
from llamaconv.model.names import Layout
from llamaconv.model.params import LlamaParams, RopeScaling
from llamaconv.model.published import LLAMA_3_THETA, LLAMA_31_SCALING, PUBLISHED
from llamaconv.report.tables import Table

# The scaling of every stock flavour of 0.2.x and 0.3.0; 0.1.0 has none.
STOCK_SCALING = LLAMA_31_SCALING

IN_HUGGINGFACE = "--checkpoint.initial_load_in_hf"
"""The flag with which a release starts from a Hugging Face folder."""


ROTATIONS: Mapping[Layout, str] = {
    "half_split": "a rotate-half RoPE",
    "interleaved": "a RoPE of complex numbers",
}
"""The RoPE that rows of each layout need."""


@dataclass(frozen=True)
class Flavour:
    """One of TorchTitan's stock models. How its RoPE is scaled depends on the release.

    Attributes:
        name: Its name there.
        params: Its parameters, without a scaling.
    """

    name: str
    params: LlamaParams

    @property
    def module(self) -> str:
        """The name of the model that it is a flavour of."""
        return FAMILIES[self.params.family].titan.module

    def fits(self, params: LlamaParams, biases: Collection[str] = ()) -> bool:
        """Return whether a model has these shapes, RoPE base and eps, whatever its scaling.

        Args:
            params: The parameters of the model.
            biases: The roles of its biases; no stock flavour has any.
        """
        module = FAMILIES[params.family].titan.module
        # What else differs between families of one module is in no tensor.
        alike = replace(params, rope_scaling=None, max_position=None, family=self.params.family)
        return not biases and module == self.module and alike == self.params


def _flavour(model: str) -> Flavour:
    """Return the flavour with the parameters of a published model, named by its size."""
    params = next(one.params for one in PUBLISHED if one.name == model)
    return Flavour(model.split()[-1], replace(params, rope_scaling=None, max_position=None))


_LLAMA_DEBUGMODEL = LlamaParams(256, 6, 16, 16, 16, 768, 2048, 1e-5, LLAMA_3_THETA)
_QWEN_DEBUGMODEL = LlamaParams(256, 8, 16, 8, 128, 3072, 2048, 1e-6, 1e6, tied=True, family="qwen3")

FLAVOURS = (
    *map(_flavour, ("Llama 3.2 1B", "Llama 3.2 3B", "Llama 3.1 8B", "Llama 3.1 70B")),
    _flavour("Llama 3.1 405B"),
    Flavour("debugmodel", _LLAMA_DEBUGMODEL),
    *(_flavour(f"Qwen 3 {size}") for size in ("0.6B", "1.7B", "4B", "8B", "14B", "32B")),
    Flavour("debugmodel", _QWEN_DEBUGMODEL),
)


@dataclass(frozen=True)
class Release:
    """One release of TorchTitan.

    Attributes:
        version: The release.
        generation: The tensor names that it reads.
        flavours: For each model that was run, the flavours that a flag chooses (0.3.0 also defines
            1B and 3B of llama3, and 4B and 8B of qwen3, but has no configuration for them).
        scaling: The RoPE scaling of the stock flavours of each model; they are plain if it has none.
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
        reads_stores: Whether it loads a DCP from the address of a store, with fsspec.
        ignores_path: Whether it trains from random weights if its dump folder holds an empty
            ``checkpoint`` folder, whatever path it is given.
    """

    version: str
    generation: str
    flavours: Mapping[str, tuple[str, ...]]
    scaling: Mapping[str, RopeScaling]
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
    reads_stores: bool
    ignores_path: bool


_STOCK = {"llama3": ("8B", "70B", "405B", "debugmodel")}
# What the configurations of 0.3.0 build.
_STOCK_0_3 = {**_STOCK, "qwen3": ("0.6B", "1.7B", "14B", "32B", "debugmodel")}
_SCALED = {"llama3": STOCK_SCALING}
# What its reader of tokenizers looks for.
_FAST_TOKENIZER = ("tokenizer.json", "vocab.json", "vocab.txt")
_OLD_CHOOSE = "--model.name {module} --model.flavor {flavour}"
_OLD_DEFINE = f"{_OLD_CHOOSE} --experimental.custom_import converted_llama"

# Newest first of each generation.
RELEASES = (
    Release(
        version="0.3.0",
        generation="titan-0.3",
        flavours=_STOCK_0_3,
        scaling=_SCALED,
        tied=True,
        wide_heads=True,
        enable="--checkpoint.enable",
        full="--checkpoint.no_initial_load_model_only",
        dump_folder="--dump_folder",
        choose="--module {module} --config {module}_{flavour}",
        define="--module converted_llama --config {flavour}",
        tokenizer="--hf_assets_path",
        tokenizer_is="folder",
        tokenizer_files=_FAST_TOKENIZER,
        text_flags="",
        text="the text is read from the Hub; a local one is --dataloader.dataset c4_test "
        "--dataloader.dataset_path DIR",
        reads_huggingface=True,
        reads_stores=True,
        ignores_path=False,
    ),
    Release(
        version="0.2.2",
        generation="titan-0.2",
        flavours=_STOCK,
        scaling=_SCALED,
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
        reads_stores=False,
        ignores_path=True,
    ),
    Release(
        version="0.1.0",
        generation="titan-0.2",
        flavours={"llama3": _STOCK["llama3"][:3]},
        scaling={},
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
        reads_stores=False,
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


def flavours_of(params: LlamaParams) -> tuple[Flavour, ...]:
    """Return the flavours of the model that computes what the family of ``params`` does."""
    module = FAMILIES[params.family].titan.module
    return tuple(one for one in FLAVOURS if one.module == module)


def flavour_of_shapes(params: LlamaParams, biases: Collection[str] = ()) -> Flavour | None:
    """Return the flavour with these shapes, base and eps, whatever its RoPE scaling."""
    return next((flavour for flavour in FLAVOURS if flavour.fits(params, biases)), None)


def stock_flavour(
    params: LlamaParams, release: Release, layout: Layout, biases: Collection[str] = ()
) -> Flavour | None:
    """Return the flavour with exactly these parameters, and rows in its layout.

    Args:
        params: The model.
        release: The release.
        layout: The layout of the q and k rows.
        biases: The roles of the biases.
    """
    titan = FAMILIES[params.family].titan
    near = flavour_of_shapes(params, biases)
    chosen = near is not None and near.name in release.flavours.get(titan.module, ())
    exact = chosen and layout == titan.layout
    return near if exact and params.rope_scaling == release.scaling.get(titan.module) else None


def fits(
    params: LlamaParams,
    layout: Layout,
    is_huggingface: bool = False,
    biases: Collection[str] = (),
) -> Table:
    """Return one row per release: the names it reads, and the stock flavour or why none fits.

    The last row is about the main branch, whose flavours were not run.

    Args:
        params: The model.
        layout: The layout of the q and k rows of the DCP.
        is_huggingface: Whether the source is a Hugging Face folder that a release can read too.
        biases: The roles of the biases that the DCP has.
    """
    rows = []
    for release in RELEASES:
        flavour = stock_flavour(params, release, layout, biases)
        rows.append(
            (
                release.version,
                release.generation,
                flavour.name if flavour else "none",
                _fitting(release, is_huggingface)
                if flavour
                else why_not(params, release, layout)
                or f"{_difference(params, release, layout, biases)}; `convert` writes a module for it",
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


def _difference(
    params: LlamaParams, release: Release, layout: Layout, biases: Collection[str]
) -> str:
    titan = FAMILIES[params.family].titan
    near = flavour_of_shapes(params, biases)
    if biases:
        return f"no flavour has biases (this model: {', '.join(sorted(biases))})"
    if near is None:
        return "no flavour has these shapes, RoPE base and eps"
    if layout != titan.layout:
        return f"{near.name} rotates {titan.layout} pairs"
    if near.name not in release.flavours[titan.module]:
        return f"{near.name} has no configuration"
    stock, own = (
        s.factor if s else "none" for s in (release.scaling.get(titan.module), params.rope_scaling)
    )
    return f"{near.name} has RoPE scaling {stock}, this model {own}"


def why_not(
    params: LlamaParams, release: Release, layout: Layout, biases: Collection[str] = ()
) -> str:
    """Return why the release has no such model; empty if it has."""
    titan = FAMILIES[params.family].titan
    if titan.module not in release.flavours:
        return f"no {titan.module} of this release is supported; use --generation titan-0.3"
    if biases and release.generation != "titan-0.3":
        return f"TorchTitan {release.version} has no biases; use --generation titan-0.3"
    if params.q_rows != params.dim and not release.wide_heads:
        return (
            f"TorchTitan {release.version} has heads of dim / n_heads only, not of {params.head_dim}; "
            "use --generation titan-0.3"
        )
    if params.rope_scaling and not release.scaling:
        return f"TorchTitan {release.version} has no RoPE scaling"
    if layout != titan.layout and release.generation != "titan-0.3":
        return (
            f"every stock {titan.module} rotates {titan.layout} pairs, and {layout} rows need "
            f"{ROTATIONS[layout]}; use --generation titan-0.3"
        )
    if layout == "half_split" and params.rope_scaling:
        return (
            f"{layout} rows need {ROTATIONS[layout]} that scales, and CosSinRoPE has no such scaling; "
            "use --rope interleaved"
        )
    return ""
