"""The module that defines a converted model for TorchTitan, where no stock flavour is that model.

TorchTitan imports it by name from the folder where training is started. A release's own builders are
used, and every parameter is written out as a number.
"""

from __future__ import annotations

from llamaconv.model.names import Layout
from llamaconv.model.params import LlamaParams
from llamaconv.torchtitan.releases import Release

NAME = "converted_llama.py"
"""The name of its file; the flags of every release import it by this name."""


def module_text(params: LlamaParams, release: Release, layout: Layout) -> str:
    """Return the text of `NAME`, which defines the model for one release."""
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
