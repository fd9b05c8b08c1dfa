"""How to start training from a checkpoint: the exact command for each TorchTitan release.

A stock flavour is advised only where every parameter is the checkpoint's, and otherwise a short
module that defines the model, to be imported by TorchTitan.

Limit: the advice starts training; learning rate and parallelism remain the user's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llamaconv import shell
from llamaconv.keys import Layout
from llamaconv.params import LlamaParams
from llamaconv.problems import printable
from llamaconv.titan import Release, flavour_of_shapes, releases_of, stock_flavour, why_not


@dataclass(frozen=True)
class Advice:
    """How to train from a checkpoint with one release, named in ``release``.

    ``command`` is complete; ``module`` is the text of ``converted_llama.py``, to be put where
    the command is run, empty where a stock flavour fits. Both are empty where the release has
    no such model; ``notes`` say why, and what to mind. ``older`` are the releases before it
    that read the same checkpoint.
    """

    release: str
    flavour: str
    command: str
    module: str
    notes: tuple[str, ...]
    older: tuple[Advice, ...] = ()

    def __str__(self) -> str:
        lines = [f"# {self.release}"]
        if self.module:
            lines += ["# save as converted_llama.py and run from its folder:", self.module]
        lines += [printable(self.command), *(f"note: {note}" for note in self.notes)]
        lines += map(str, self.older)
        return "\n".join(line for line in lines if line)

    def to_json(self) -> dict[str, Any]:
        """What scripts get: ``next`` is the command, or empty."""
        return {
            "release": self.release,
            "next": self.command,
            "module": self.module,
            "notes": list(self.notes),
            "older": [advice.to_json() for advice in self.older],
        }


def advise(
    params: LlamaParams,
    generation: str,
    layout: Layout,
    checkpoint: Path,
    dump_folder: Path | None = None,
) -> Advice:
    """How to start training from a converted checkpoint, with every release that reads it.

    ``checkpoint`` is its folder; with ``dump_folder`` it lies there as ``checkpoint/step-0``
    and needs no path. The newest release's advice, with that of ``older`` ones in it.
    """
    releases = releases_of(generation)
    if not releases:
        note = (
            "no release loads these names as they are; convert to titan-0.3 or titan-0.2 to train"
        )
        return Advice("TorchTitan of 2024", "", "", "", (note,))
    newest, *older = (
        _advise_for(release, params, layout, checkpoint, dump_folder) for release in releases
    )
    return replace(newest, older=tuple(older))


def _advise_for(
    release: Release,
    params: LlamaParams,
    layout: Layout,
    checkpoint: Path,
    dump_folder: Path | None,
) -> Advice:
    if missing := why_not(params, release, layout):
        return Advice(f"TorchTitan {release.version}", "", "", "", (missing,))
    flavour = stock_flavour(params, release) if layout == "interleaved" else None
    name = flavour.name if flavour else "converted"
    words = release.choose if flavour else release.define
    # 0.3.0 names its configurations in lower case.
    chosen = name.lower() if release.generation == "titan-0.3" else name
    place = (
        f"{release.dump_folder} {shell.quote(str(dump_folder.absolute()))}"
        if dump_folder
        else f"--checkpoint.initial_load_path {shell.quote(str(checkpoint.absolute()))}"
    )
    command = (
        f"torchrun --nproc-per-node 8 -m torchtitan.train {words.format(flavour=chosen)} "
        f"{release.enable} {place}"
    )
    module = "" if flavour else _module(params, release, layout)
    return Advice(
        f"TorchTitan {release.version}",
        name,
        command,
        module,
        tuple(_notes(params, release, dump_folder)),
    )


def _notes(params: LlamaParams, release: Release, dump_folder: Path | None) -> list[str]:
    notes = []
    near = flavour_of_shapes(params)
    if near and params.rope_scaling != release.scaling:
        factor = params.rope_scaling.factor if params.rope_scaling else "none"
        stock = release.scaling.factor if release.scaling else "none"
        notes.append(
            f"do not use the stock flavour {near.name}: its RoPE scaling is {stock}, this model's "
            f"{factor}; short prompts would hide the difference"
        )
    if params.tied and not release.tied:
        notes.append(
            f"TorchTitan {release.version} does not tie the head to the embedding: "
            "they start equal and train apart"
        )
    notes.append(release.data.format(vocab_size=params.vocab_size))
    if release.generation == "titan-0.2" and dump_folder is None:
        notes.append(
            "the dump folder must hold no checkpoint/ folder yet: with one, even empty, this release "
            "ignores the path and trains from random weights (convert with --as-step-0 to be safe)"
        )
    return notes


def _module(params: LlamaParams, release: Release, layout: Layout) -> str:
    """The text of ``converted_llama.py``, which defines the model for one release."""
    template = _MODULE_0_3 if release.generation == "titan-0.3" else _MODULE_0_2
    scaling = params.rope_scaling
    if release.generation == "titan-0.3":
        rope = "ComplexRoPE" if layout == "interleaved" else "CosSinRoPE"
        scaled = (
            f'scaling="llama", scaling_factor={scaling.factor}, '
            f"low_freq_factor={scaling.low_freq_factor}, high_freq_factor={scaling.high_freq_factor}, "
            f"original_max_position_embeddings={scaling.original_max_position}"
            if scaling
            else 'scaling="none"'
        )
    else:
        rope = ""
        # 0.2.x has no switch for its scaling, but a factor of 1 leaves the frequencies alone.
        scaled = (
            f"\n    rope_scaling_args=RoPEScalingArgs({scaling.factor}, {scaling.low_freq_factor}, "
            f"{scaling.high_freq_factor}, {scaling.original_max_position}),"
            if scaling
            else "\n    rope_scaling_args=RoPEScalingArgs(scaling_factor=1.0),"
        )
        if release.scaling is None:
            scaled = ""
    return template.format(
        p=params,
        version=release.version,
        configs="llama3_configs" if release.version == "0.1.0" else "llama3_args",
        scaling_import=(
            "from torchtitan.models.llama3.model.args import RoPEScalingArgs\n"
            if "RoPEScalingArgs" in scaled
            else ""
        ),
        scaled=scaled,
        rope=rope,
        # The width is a multiple of multiple_of just above multiplier * 8/3 dim.
        multiplier=(params.ffn_dim - 0.5) / int(8 * params.dim / 3),
        max_seq_len=params.max_position or 131072,
    )


_MODULE_0_2 = '''\
"""The converted model as a flavour of TorchTitan {version}."""

{scaling_import}from torchtitan.models.llama3 import TransformerModelArgs, {configs}

{configs}["converted"] = TransformerModelArgs(
    dim={p.dim},
    n_layers={p.n_layers},
    n_heads={p.n_heads},
    n_kv_heads={p.n_kv_heads},
    vocab_size={p.vocab_size},
    multiple_of={p.ffn_dim},
    ffn_dim_multiplier={multiplier!r},
    norm_eps={p.norm_eps!r},
    rope_theta={p.rope_theta!r},{scaled}
)
'''

_MODULE_0_3 = '''\
"""The converted model as a configuration of TorchTitan {version}."""

from functools import partial

from torch import nn
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.models.common import {rope}, Embedding, Linear, RMSNorm
from torchtitan.models.common.config_utils import (
    get_attention_config,
    make_ffn_config,
    make_gqa_config,
)
from torchtitan.models.llama3.config_registry import llama3_8b
from torchtitan.models.llama3.model import Llama3Model, Llama3TransformerBlock

# Only for what the checkpoint does not fill, and it fills everything.
INIT = {{"weight": partial(nn.init.normal_, std=0.02)}}
ROPE = {rope}.Config(dim={p.head_dim}, max_seq_len={max_seq_len}, theta={p.rope_theta!r}, {scaled})


def norm():
    return RMSNorm.Config(normalized_shape={p.dim}, eps={p.norm_eps!r}, param_init=INIT)


def layer():
    return Llama3TransformerBlock.Config(
        attention_norm=norm(),
        ffn_norm=norm(),
        attention=make_gqa_config(
            dim={p.dim},
            n_heads={p.n_heads},
            n_kv_heads={p.n_kv_heads},
            head_dim={p.head_dim},
            wqkv_param_init=INIT,
            wo_param_init=INIT,
            inner_attention=get_attention_config("flex"),
            fuse_qkv=True,
            rope=ROPE,
        ),
        feed_forward=make_ffn_config(
            dim={p.dim}, hidden_dim={p.ffn_dim}, w1_param_init=INIT, w2w3_param_init=INIT
        ),
    )


def converted():
    config = llama3_8b()
    config.model_spec.flavor = "converted"
    config.model_spec.model = Llama3Model.Config(
        dim={p.dim},
        vocab_size={p.vocab_size},
        enable_weight_tying={p.tied},
        tok_embeddings=Embedding.Config(
            num_embeddings={p.vocab_size}, embedding_dim={p.dim}, param_init=INIT
        ),
        norm=norm(),
        lm_head=Linear.Config(in_features={p.dim}, out_features={p.vocab_size}, param_init=INIT),
        layers=[layer() for _ in range({p.n_layers})],
    )
    loss = CrossEntropyLoss.Config(global_vocab_size={p.vocab_size})
    config.loss = ChunkedLossWrapper.Config(loss_fn=loss)
    config.training.seq_len = min({max_seq_len}, config.training.seq_len)
    return config
'''
