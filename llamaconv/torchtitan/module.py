"""The module that defines a converted model for TorchTitan, where no stock flavour is that model.

TorchTitan imports it by name from the folder where training is started. A release's own builders are
used, and every parameter is written out as a number.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from llamaconv.model.families import FAMILIES
from llamaconv.model.names import Layout
from llamaconv.model.params import LlamaParams
from llamaconv.torchtitan.releases import Release

NAME = "converted_llama.py"
"""The name of its file; the flags of every release import it by this name."""


def module_text(
    params: LlamaParams, release: Release, layout: Layout, biases: Collection[str] = ()
) -> str:
    """Return the text of `NAME`, which defines the model for one release.

    Args:
        params: The model.
        release: The release that is to build it.
        layout: The layout of the q and k rows of the checkpoint.
        biases: The roles of the biases that the checkpoint has.
    """
    titan = FAMILIES[params.family].titan
    template = _MODULE_0_3 if release.generation == "titan-0.3" else _MODULE_0_2
    has_norms = "q_norm" in FAMILIES[params.family].roles
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
        if not release.scaling:
            scaled = ""
    return template.format(
        p=params,
        titan=titan,
        qk_norm=f"\n            qk_norm=norm({params.head_dim})," if has_norms else "",
        biased="".join(f"\n    {line}" for line in _bias_lines(biases)),
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


# The matrices of 0.3.0 that can have a bias, by the roles whose biases they then have.
_BIASED = {
    ("wq.bias", "wk.bias", "wv.bias"): "config.attention.qkv_linear.wqkv",
    ("wo.bias",): "config.attention.wo",
    ("w1.bias",): "config.feed_forward.w1",
    ("w2.bias",): "config.feed_forward.w2",
    ("w3.bias",): "config.feed_forward.w3",
}


def _bias_lines(biases: Collection[str]) -> Iterator[str]:
    """Yield the lines that give a layer of 0.3.0 its biases."""
    for roles, linear in _BIASED.items():
        if not set(roles).isdisjoint(biases):
            yield f"{linear}.bias = True"


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
from torchtitan.models.{titan.module}.config_registry import {titan.config}
from torchtitan.models.{titan.module}.model import {titan.classes}Model, {titan.classes}TransformerBlock

# Only for what the checkpoint does not fill, and it fills everything.
INIT = {{"weight": partial(nn.init.normal_, std=0.02)}}
LINEAR = INIT | {{"bias": nn.init.zeros_}}
ROPE = {rope}.Config(dim={p.head_dim}, max_seq_len={max_seq_len}, theta={p.rope_theta!r}, {scaled})


def norm(width={p.dim}):
    return RMSNorm.Config(normalized_shape=width, eps={p.norm_eps!r}, param_init=INIT)


def layer():
    config = {titan.classes}TransformerBlock.Config(
        attention_norm=norm(),
        ffn_norm=norm(),
        attention=make_gqa_config(
            dim={p.dim},
            n_heads={p.n_heads},
            n_kv_heads={p.n_kv_heads},
            head_dim={p.head_dim},
            wqkv_param_init=LINEAR,
            wo_param_init=LINEAR,
            inner_attention=get_attention_config("flex"),
            fuse_qkv=True,
            rope=ROPE,{qk_norm}
        ),
        feed_forward=make_ffn_config(
            dim={p.dim}, hidden_dim={p.ffn_dim}, w1_param_init=LINEAR, w2w3_param_init=LINEAR
        ),
    ){biased}
    return config


def converted():
    config = {titan.config}()
    config.model_spec.flavor = "converted"
    config.model_spec.model = {titan.classes}Model.Config(
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
