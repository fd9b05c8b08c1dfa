"""What to create from a checkpoint: the options of a conversion, and the rules of each format."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from llamaconv.checkpoint.checkpoint import Checkpoint, Format
from llamaconv.model.families import FAMILIES, LLAMA
from llamaconv.model.names import Layout
from llamaconv.report.errors import Problem, RefusedError

CHOICES: dict[str, tuple[str, ...]] = {
    "to": ("auto", "dcp", "hf", "meta"),
    "generation": ("titan-0.3", "titan-main", "titan-0.2", "titan-2024"),
    "rope": ("auto", "interleaved", "half_split"),
    "dtype": ("keep", "float32", "bfloat16", "float16"),
    "tie": ("auto", "embedding", "head", "untie"),
}
"""The values of each option that has a fixed set; the command line and notebooks offer the same."""


@dataclass(frozen=True)
class Rules:
    """What a format decides, and what it leaves to the options.

    Attributes:
        to: The value of ``--to`` that chooses the format; "" for one that is read and not written.
        title: Its name in tables.
        naming: The naming of its tensors (`llamaconv.model.names.NAMINGS`), None if the option
            ``generation`` decides.
        layout: The layout of its q and k rows, None if the option ``rope`` decides.
        options: The options that only some formats have, and that this one has.
        by_default: The format that a checkpoint of this one is converted to if ``--to`` is auto.
    """

    to: str
    title: str
    naming: str | None
    layout: Layout | None
    options: frozenset[str]
    by_default: Format


RULES: dict[Format, Rules] = {
    "huggingface": Rules(
        "hf", "Hugging Face", "huggingface", "half_split", frozenset({"max_shard_size"}), "dcp"
    ),
    "meta": Rules("meta", "Meta", "meta", "interleaved", frozenset({"shards"}), "dcp"),
    "dcp": Rules(
        "dcp",
        "dcp",
        None,
        None,
        frozenset({"generation", "rope", "shards", "as_step_0", "with_optimizer"}),
        "huggingface",
    ),
    "torch_checkpointing": Rules("", "torch_checkpointing", None, None, frozenset(), "huggingface"),
}
"""The rules by format, as `llamaconv.checkpoint.checkpoint.Checkpoint.format` names it."""

_FORMATS: dict[str, Format] = {rules.to: name for name, rules in RULES.items() if rules.to} | {
    "auto": "dcp"
}


@dataclass(frozen=True)
class Target:
    """What to create from a checkpoint: the options of the command line, by the same names.

    Attributes:
        to: The format: "dcp" (TorchTitan), "hf" (Hugging Face), "meta" (Meta's original files), or
            "auto" for Hugging Face from what a trainer saved (a DCP, torch_checkpointing), and for a
            DCP from all else.
        generation: The tensor names of a DCP: "titan-0.3" for TorchTitan 0.3.0, "titan-main" for
            its main branch since 2026-09-21 (fused wqkv and w13, in no release yet), "titan-0.2"
            for 0.1.0 to 0.2.2, "titan-2024" for its conversion script of 2024.
        rope: The layout of q and k rows in a DCP. "auto" is the one that TorchTitan's stock models
            of the family rotate: "interleaved" for its llama3, "half_split" for its qwen3. With the
            other one, the model must rotate the other pairs.
        dtype: "keep" each tensor's dtype, or cast all to this one. A value that overflows fails
            the conversion.
        shards: Row chunks per tensor in a DCP, cut as FSDP cuts (a fused w13 within both of its
            halves); number of consolidated files in Meta's format. From 1 to 65536.
        max_shard_size: Most bytes per file of a Hugging Face folder. A longer tensor gets a file of
            its own.
        assets: A folder with the model's config.json, and its tokenizer if the target should have
            one. Empty for the source's own folder, or the one that the source's receipt names. It
            is needed for a DCP or Meta's files that llamaconv did not write, and for a Hugging Face
            folder without config.json.
        tie: What a tied or conflicting head becomes: "embedding" or "head" writes both from that
            one, "untie" keeps both, "auto" follows the configuration and fails on a conflict.
        with_optimizer: Carry a training run's optimizer and the rest of its trainer's state along,
            from DCP to DCP; "auto" is then a DCP. Without it they are left out.

    Raises:
        RefusedError: A value is not offered.
    """

    to: str = "auto"
    generation: str = "titan-0.3"
    rope: Layout | Literal["auto"] = "auto"
    dtype: str = "keep"
    shards: int = 1
    max_shard_size: int = 5_000_000_000
    assets: str = ""
    tie: str = "auto"
    with_optimizer: bool = False

    def __post_init__(self) -> None:
        problems = [
            f"{option} must be one of {', '.join(choices)}; got {value!r}"
            for option, choices in CHOICES.items()
            if (value := getattr(self, option)) not in choices
        ]
        if type(self.shards) is not int or not 1 <= self.shards <= 65536:
            problems.append(f"shards must be between 1 and 65536; got {self.shards!r}")
        if type(self.max_shard_size) is not int or self.max_shard_size < 1:
            problems.append(
                f"max_shard_size must be a positive number of bytes; got {self.max_shard_size!r}"
            )
        if type(self.with_optimizer) is not bool:
            problems.append(f"with_optimizer must be true or false; got {self.with_optimizer!r}")
        if problems:
            raise RefusedError(map(Problem, problems))

    def resolve(self, source: Checkpoint) -> Target:
        """Return the same target with every "auto" replaced by what suits ``source``.

        ``rope`` stays if the parameters of ``source`` are not known yet, or if the format decides.
        """
        usual = "dcp" if self.with_optimizer else RULES[source.format].by_default
        to = RULES[usual].to if self.to == "auto" else self.to
        rope = self.rope
        if rope == "auto" and source.params and not RULES[_FORMATS[to]].layout:
            rope = FAMILIES[source.params.family].titan.layout
        return replace(self, to=to, rope=rope)

    @property
    def format(self) -> Format:
        """The key of `RULES`; that of a DCP until "auto" is resolved."""
        return _FORMATS[self.to]

    @property
    def naming(self) -> str:
        """The naming of the target's tensors, a key of `llamaconv.model.names.Role.names`."""
        return RULES[self.format].naming or self.generation

    @property
    def layout(self) -> Layout:
        """The layout of the target's q and k rows."""
        usual = LLAMA.titan.layout if self.rope == "auto" else self.rope
        return RULES[self.format].layout or usual

    def __str__(self) -> str:
        rules = RULES[self.format]
        return rules.title if rules.naming else f"{rules.title} {self.generation}"


def target_like(found: Checkpoint) -> Target:
    """Return the options whose target has the format and the names of ``found``.

    Raises:
        RefusedError: ``found`` is a DCP whose names belong to no generation, or of a format that is
            not written.
    """
    rules = RULES[found.format]
    if not rules.to:
        raise RefusedError(f"{found.path}: {rules.title} is read, not written, so it is no target")
    if rules.naming:
        return Target(to=rules.to)
    if found.generation not in CHOICES["generation"]:
        reason = "its tensor names belong to no TorchTitan generation, and it has no receipt"
        raise RefusedError(found.errors or f"{found.path}: {reason}")
    return Target(to=rules.to, generation=found.generation)
