"""The published Llamas and their relatives, and which of them a checkpoint's parameters are closest to.

Weights do not state their name; shapes and RoPE's parameters nearly do. Sources: for Llama 3 and
later Meta's llama-models (models/sku_list.py: sizes, vocabulary, RoPE base, scaling);
Llama 1 and 2, the tables of arXiv 2302.13971 and 2307.09288 and the params.json released with
them; Code Llama, arXiv 2308.12950 (base 1e6, 16 more tokens for infilling); Qwen 3, TorchTitan
0.3.0 (models/qwen3); Qwen 2.5, LitGPT (litgpt/config.py), which lists their config.json files.

Limit: a fine-tuned model has the sizes of its base, and gets its name. A base model and its
instruction model cannot be told apart, nor can releases that differ only in their values.
"""

from __future__ import annotations

import html
from dataclasses import dataclass, replace

from llamaconv.model.families import FAMILIES, LLAMA
from llamaconv.model.params import LlamaParams, RopeScaling
from llamaconv.report.tables import Table

LLAMA_3_THETA = 500_000.0
# rope_scaling in the config.json of both; Meta's code has the first built in.
LLAMA_31_SCALING = RopeScaling(8.0, 1.0, 4.0, 8192)
LLAMA_32_SCALING = RopeScaling(32.0, 1.0, 4.0, 8192)

_SIZES = ("family", "dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim")


@dataclass(frozen=True)
class Published:
    """A released model; the attributes are those of `LlamaParams`.

    ``max_position`` is what its config.json says, None if base and instruction model differ in it.
    ``norm_eps`` is None if it does not tell releases
    apart; then it is not compared. ``head_dim`` is None for heads of ``dim / n_heads``.
    """

    name: str
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    ffn_dim: int
    vocab_size: int = 32000
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tied: bool = False
    norm_eps: float | None = None
    max_position: int | None = 2048
    family: str = "llama"
    head_dim: int | None = None

    def has_sizes_of(self, params: LlamaParams) -> bool:
        """Return whether family, layers, widths and heads are those of ``params``."""
        same = all(getattr(self, name) == getattr(params, name) for name in _SIZES)
        return same and (self.head_dim or self.dim / self.n_heads) == params.head_dim

    @property
    def params(self) -> LlamaParams:
        """Its parameters; eps is 1e-5, that of most releases, if it does not tell them apart."""
        return LlamaParams(
            dim=self.dim,
            n_layers=self.n_layers,
            n_heads=self.n_heads,
            n_kv_heads=self.n_kv_heads,
            head_dim=self.head_dim or self.dim // self.n_heads,
            ffn_dim=self.ffn_dim,
            vocab_size=self.vocab_size,
            norm_eps=self.norm_eps or 1e-5,
            rope_theta=self.rope_theta,
            rope_scaling=self.rope_scaling,
            tied=self.tied,
            max_position=self.max_position,
            family=self.family,
        )

    def differences(self, params: LlamaParams) -> tuple[str, ...]:
        """Return what differs in addition to the sizes, one text each with both values."""
        pairs = {
            "vocabulary": (params.vocab_size, self.vocab_size),
            "RoPE base": (f"{params.rope_theta:g}", f"{self.rope_theta:g}"),
            "RoPE scaling": (_scaling(params.rope_scaling), _scaling(self.rope_scaling)),
            "head": (_head(params.tied), _head(self.tied)),
            "eps": (f"{params.norm_eps:g}", f"{self.norm_eps or params.norm_eps:g}"),
        }
        return tuple(
            f"{what} {found} (published: {expected})"
            for what, (found, expected) in pairs.items()
            if found != expected
        )


def _scaling(scaling: RopeScaling | None) -> str:
    if scaling is None:
        return "none"
    if scaling.is_linear:
        return str(scaling)
    return (
        f"{scaling.factor:g} ({scaling.low_freq_factor:g} to {scaling.high_freq_factor:g} rotations "
        f"in {scaling.original_max_position:,})"
    )


def _head(tied: bool) -> str:
    return "tied" if tied else "untied"


_LLAMA_3 = tuple(
    Published(name, *sizes, vocab_size=128256, rope_theta=LLAMA_3_THETA, tied=tied)
    for name, sizes, tied in (
        ("Llama 3 8B", (4096, 32, 32, 8, 14336), False),
        ("Llama 3 70B", (8192, 80, 64, 8, 28672), False),
        ("Llama 3.1 405B", (16384, 126, 128, 8, 53248), False),
        ("Llama 3.2 1B", (2048, 16, 32, 8, 8192), True),
        ("Llama 3.2 3B", (3072, 28, 24, 8, 8192), True),
    )
)


def _llama_3(release: str, scaling: RopeScaling | None, *sizes: str) -> tuple[Published, ...]:
    """Return the models of one release; their sizes have the same shapes in every release."""
    found = {one.name.split()[-1]: one for one in _LLAMA_3}
    context = 131072 if scaling else 8192
    return tuple(
        replace(found[size], name=f"{release} {size}", rope_scaling=scaling, max_position=context)
        for size in sizes
    )


_LLAMA_2 = (
    Published("Llama 2 7B", 4096, 32, 32, 32, 11008, norm_eps=1e-5, max_position=4096),
    Published("Llama 2 13B", 5120, 40, 40, 40, 13824, norm_eps=1e-5, max_position=4096),
    Published("Llama 2 70B", 8192, 80, 64, 8, 28672, max_position=4096),
)


def _qwen_25(size: str, *sizes: int, norm_eps: float = 1e-6, tied: bool = False) -> Published:
    """Return a Qwen 2.5: base 1e6; the vocabulary of the larger ones is padded further."""
    dim, n_layers, n_heads, n_kv_heads, ffn_dim = sizes
    return Published(
        f"Qwen 2.5 {size}",
        *(dim, n_layers, n_heads, n_kv_heads, ffn_dim),
        vocab_size=151936 if tied else 152064,
        rope_theta=1e6,
        tied=tied,
        norm_eps=norm_eps,
        max_position=None,
        family="qwen2",
    )


def _qwen_3(size: str, *sizes: int, tied: bool = False) -> Published:
    """Return a dense Qwen 3: heads of 128, 8 kv heads, base 1e6."""
    dim, n_layers, n_heads, ffn_dim = sizes
    return Published(
        f"Qwen 3 {size}",
        *(dim, n_layers, n_heads, 8, ffn_dim),
        vocab_size=151936,
        rope_theta=1e6,
        tied=tied,
        norm_eps=1e-6,
        max_position=40960,
        family="qwen3",
        head_dim=128,
    )


PUBLISHED: tuple[Published, ...] = (
    # Llama 1 and 2 of these two sizes differ in eps alone.
    *(
        replace(two, name=two.name.replace(" 2 ", " 1 "), norm_eps=1e-6, max_position=2048)
        for two in _LLAMA_2
        if two.norm_eps
    ),
    Published("Llama 1 33B", 6656, 60, 52, 52, 17920),
    Published("Llama 1 65B", 8192, 80, 64, 64, 22016),
    *_LLAMA_2,
    *(
        replace(
            two,
            name=two.name.replace("Llama 2", "Code Llama"),
            vocab_size=32016,
            rope_theta=1e6,
            max_position=16384,
        )
        for two in _LLAMA_2
        if two.norm_eps
    ),
    Published("Code Llama 34B", 8192, 48, 64, 8, 22016, rope_theta=1e6, max_position=16384),
    *_llama_3("Llama 3", None, "8B", "70B"),
    *_llama_3("Llama 3.1", LLAMA_31_SCALING, "8B", "70B", "405B"),
    *_llama_3("Llama 3.2", LLAMA_32_SCALING, "1B", "3B"),
    *_llama_3("Llama 3.3", LLAMA_31_SCALING, "70B"),
    _qwen_25("0.5B", 896, 24, 14, 2, 4864, tied=True),
    _qwen_25("1.5B", 1536, 28, 12, 2, 8960, tied=True),
    _qwen_25("3B", 2048, 36, 16, 2, 11008, tied=True),
    _qwen_25("7B", 3584, 28, 28, 4, 18944),
    _qwen_25("14B", 5120, 48, 40, 8, 13824, norm_eps=1e-5),
    _qwen_25("32B", 5120, 64, 40, 8, 27648, norm_eps=1e-5),
    _qwen_25("72B", 8192, 80, 64, 8, 29568, norm_eps=1e-5),
    _qwen_3("0.6B", 1024, 28, 16, 3072, tied=True),
    _qwen_3("1.7B", 2048, 28, 16, 6144, tied=True),
    _qwen_3("4B", 2560, 36, 32, 9728, tied=True),
    _qwen_3("8B", 4096, 36, 32, 12288),
    _qwen_3("14B", 5120, 40, 40, 17408),
    _qwen_3("32B", 5120, 64, 64, 25600),
)


@dataclass(frozen=True, repr=False)
class ClosestPublished:
    """The published models that parameters are closest to.

    Attributes:
        params: The parameters; None if they could not be read.
        names: Models of the same sizes that differ least.
        differences: What still differs.
        max_position: The longest context of these models in tokens; None if something differs.
    """

    params: LlamaParams | None
    names: tuple[str, ...] = ()
    differences: tuple[str, ...] = ()
    max_position: int | None = None

    @property
    def fits(self) -> bool:
        """Whether nothing differs."""
        return bool(self.names) and not self.differences

    @property
    def title(self) -> str:
        """The name in one line for a command line: ``Llama 3.1 8B``, if nothing differs."""
        names = " or ".join(self.names)
        if self.fits:
            return names
        if names:
            return f"sizes of {names}, but {', '.join(self.differences)}"
        return f"not a published {FAMILIES[self.params.family].title if self.params else 'Llama'}"

    def __str__(self) -> str:
        if self.params is None:
            return "Unknown model: its parameters could not be read."
        if self.fits:
            alike = "; their published sizes are the same" if len(self.names) > 1 else ""
            return f"Every parameter is that of {' and of '.join(self.names)}{alike}."
        if self.names:
            names, differences = " or ".join(self.names), ", ".join(self.differences)
            return f"The sizes are those of {names}, but {differences}."
        return f"Not a published {FAMILIES[self.params.family].title}: {self.params}."

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(str(self))}</p>"


def closest_published(params: LlamaParams | None) -> ClosestPublished:
    """Return the published models of the same sizes that are closest to ``params``."""
    if params is None:
        return ClosestPublished(None)
    near = [(one, one.differences(params)) for one in PUBLISHED if one.has_sizes_of(params)]
    if not near:
        return ClosestPublished(params)
    least = min((differences for _, differences in near), key=len)
    closest = [one for one, differences in near if differences == least]
    contexts = {one.max_position for one in closest}
    context = contexts.pop() if len(contexts) == 1 and not least else None
    return ClosestPublished(params, tuple(one.name for one in closest), least, context)


# bos_token_id and eos_token_id by the size of the vocabulary. The base models of Llama 3 end a text
# with 128001; their instruction models end a turn with 128009.
_TOKENS = {32000: (1, 2), 32016: (1, 2), 128256: (128000, 128001)}


def token_ids(vocab_size: int) -> dict[str, int]:
    """Return the ids of a published vocabulary, by their entries in config.json; else nothing."""
    names = ("bos_token_id", "eos_token_id")
    return dict(zip(names, _TOKENS.get(vocab_size, ()), strict=False))


def published(params: LlamaParams | None = None) -> Table:
    """Return the table that `closest_published` compares with, oldest model first.

    Args:
        params: A model; the table has those of its family. Without it, the Llamas.
    """
    family = params.family if params else LLAMA.model_type
    columns = ("model", "layers", "width", "heads", "kv heads", "ffn", "vocabulary", "RoPE base")
    rows = [
        (
            *(one.name, one.n_layers, one.dim, one.n_heads, one.n_kv_heads, one.ffn_dim),
            *(one.vocab_size, f"{one.rope_theta:.0f}"),
            f"{one.rope_scaling.factor:g}" if one.rope_scaling else "none",
            "tied" if one.tied else "",
        )
        for one in PUBLISHED
        if one.family == family
    ]
    return Table((*columns, "scaling", "head"), rows, right=(*columns[1:], "scaling"))
