"""Which Llama it is: the published sizes, compared with a checkpoint's parameters.

Weights do not say their name; shapes and RoPE's parameters nearly do. Sources: for Llama 3 and
later `titan.FLAVOURS` and Meta's llama-models (models/sku_list.py: vocabulary, RoPE base, scaling);
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
from llamaconv.titan import FLAVOURS, STOCK_SCALING

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


def _llama_3() -> tuple[Published, ...]:
    stretched = {"Llama 3.2": RopeScaling(32.0, 1.0, 4.0, 8192)}
    releases = {
        "Llama 3": ("8B", "70B"),
        "Llama 3.1": ("8B", "70B", "405B"),
        "Llama 3.2": ("1B", "3B"),
        "Llama 3.3": ("70B",),
    }
    flavours = {flavour.name: flavour for flavour in FLAVOURS}
    made = []
    for release, sizes in releases.items():
        scaling = None if release == "Llama 3" else stretched.get(release, STOCK_SCALING)
        for flavour in map(flavours.__getitem__, sizes):
            same = {name: getattr(flavour, name) for name in (*_SIZES, "vocab_size", "tied")}
            name = f"{release} {flavour.name}"
            made.append(Published(name, **same, rope_theta=500000.0, rope_scaling=scaling))
    return tuple(made)


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
    *_llama_3(),
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
