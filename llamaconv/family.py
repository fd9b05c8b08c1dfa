"""Which Llama it is: the published sizes, compared with a checkpoint's parameters.

Weights do not say their name; shapes and RoPE's parameters nearly do. Sources: for Llama 3 and
later Meta's llama-models (models/sku_list.py: sizes, vocabulary, RoPE base, scaling);
Llama 1 and 2, the tables of arXiv 2302.13971 and 2307.09288 and the params.json released with
them; Code Llama, arXiv 2308.12950 (base 1e6, 16 more tokens for infilling).

Limit: a fine-tuned model has the sizes of its base and is called by them; base and instruction
model cannot be told apart, and neither can releases that differ in the values alone.
"""

from __future__ import annotations

import html
from dataclasses import dataclass, replace

from llamaconv.params import LlamaParams, RopeScaling
from llamaconv.tables import Table

LLAMA_3_THETA = 500_000.0
# rope_scaling in the config.json of both; Meta's code has the first built in.
LLAMA_31_SCALING = RopeScaling(8.0, 1.0, 4.0, 8192)
LLAMA_32_SCALING = RopeScaling(32.0, 1.0, 4.0, 8192)

_SIZES = ("dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim")


@dataclass(frozen=True)
class Published:
    """A released model. Where ``norm_eps`` is None it tells nothing and is not compared."""

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

    def has_sizes_of(self, params: LlamaParams) -> bool:
        """Whether layers, widths and heads are those of ``params``."""
        same = all(getattr(self, name) == getattr(params, name) for name in _SIZES)
        return same and self.dim == params.q_rows

    def differences(self, params: LlamaParams) -> tuple[str, ...]:
        """What differs beside the sizes, each as ``what is found, what was published``."""
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
    return (
        f"{scaling.factor:g} ({scaling.low_freq_factor:g} to {scaling.high_freq_factor:g} turns "
        f"in {scaling.original_max_position:,})"
    )


def _head(tied: bool) -> str:
    return "tied" if tied else "of its own"


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
    """The models of one release, with the shapes that their sizes have in every release."""
    found = {one.name.split()[-1]: one for one in _LLAMA_3}
    return tuple(
        replace(found[size], name=f"{release} {size}", rope_scaling=scaling) for size in sizes
    )


_LLAMA_2 = (
    Published("Llama 2 7B", 4096, 32, 32, 32, 11008, norm_eps=1e-5),
    Published("Llama 2 13B", 5120, 40, 40, 40, 13824, norm_eps=1e-5),
    Published("Llama 2 70B", 8192, 80, 64, 8, 28672),
)

PUBLISHED: tuple[Published, ...] = (
    # Llama 1 and 2 of these two sizes differ in eps alone.
    *(
        replace(two, name=two.name.replace(" 2 ", " 1 "), norm_eps=1e-6)
        for two in _LLAMA_2
        if two.norm_eps
    ),
    Published("Llama 1 33B", 6656, 60, 52, 52, 17920),
    Published("Llama 1 65B", 8192, 80, 64, 64, 22016),
    *_LLAMA_2,
    *(
        replace(
            two, name=two.name.replace("Llama 2", "Code Llama"), vocab_size=32016, rope_theta=1e6
        )
        for two in _LLAMA_2
        if two.norm_eps
    ),
    Published("Code Llama 34B", 8192, 48, 64, 8, 22016, rope_theta=1e6),
    *_llama_3("Llama 3", None, "8B", "70B"),
    *_llama_3("Llama 3.1", LLAMA_31_SCALING, "8B", "70B", "405B"),
    *_llama_3("Llama 3.2", LLAMA_32_SCALING, "1B", "3B"),
    *_llama_3("Llama 3.3", LLAMA_31_SCALING, "70B"),
)


@dataclass(frozen=True, repr=False)
class Family:
    """What the parameters are those of.

    ``names`` are the published models with the same sizes that differ least; ``differences``
    what differs still, nothing where they fit.
    """

    params: LlamaParams | None
    names: tuple[str, ...] = ()
    differences: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return bool(self.names) and not self.differences

    def __str__(self) -> str:
        if self.params is None:
            return "Which Llama it is cannot be said: its parameters could not be read."
        if self.fits:
            alike = "; the published sizes of these are alike" if len(self.names) > 1 else ""
            return f"Every parameter is that of {' and of '.join(self.names)}{alike}."
        if self.names:
            return f"The sizes are those of {' or '.join(self.names)}, but {', '.join(self.differences)}."
        return f"A Llama of its own: {self.params}."

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(str(self))}</p>"


def family(params: LlamaParams | None) -> Family:
    """The published models that are closest to ``params``, among those of the same sizes."""
    if params is None:
        return Family(None)
    near = [(one, one.differences(params)) for one in PUBLISHED if one.has_sizes_of(params)]
    if not near:
        return Family(params)
    least = min((differences for _, differences in near), key=len)
    names = tuple(one.name for one, differences in near if differences == least)
    return Family(params, names, least)


def published() -> Table:
    """The table that `family` compares with, oldest first."""
    columns = ("model", "layers", "width", "heads", "kv heads", "ffn", "vocabulary", "RoPE base")
    rows = [
        (
            *(one.name, one.n_layers, one.dim, one.n_heads, one.n_kv_heads, one.ffn_dim),
            *(one.vocab_size, f"{one.rope_theta:.0f}"),
            f"{one.rope_scaling.factor:g}" if one.rope_scaling else "none",
            "tied" if one.tied else "",
        )
        for one in PUBLISHED
    ]
    return Table((*columns, "scaling", "head"), rows, right=(*columns[1:], "scaling"))
