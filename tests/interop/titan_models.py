"""TorchTitan's Llama 3 for any shape, in the two releases that the tests cover.

Runs inside a TorchTitan environment only. The idea: no stock flavour is small enough for a test, so
each release gets one more, `interop`, made from a plain dictionary of parameters by the release's own
configuration classes. The limit: attention is the dense causal kind, since FlexAttention, the default
of 0.3.0, has no backward pass on a CPU; with one document a row the two masks are the same.

The dictionary: dim, n_layers, n_heads, n_kv_heads, head_dim, ffn_dim, vocab_size, norm_eps,
rope_theta, rope_scaling (None, or factor, low_freq_factor, high_freq_factor and
original_max_position_embeddings), tied, max_seq_len.
"""

import math
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

OLDER = version("torchtitan").startswith("0.2.")
LEARNING_RATE = 0.01  # one step must change the loss by far more than rounding does
FLAVOUR_FLAGS = (
    ["--model.name", "llama3", "--model.flavor", "interop", f"--optimizer.lr={LEARNING_RATE}"]
    if OLDER
    else ["--module", "llama3", "--config", "llama3_interop"]
)
Params = dict[str, Any]


def build(params: Params) -> nn.Module:
    """The model on the CPU in fp32. Every weight is NaN, so one that a load forgets is seen."""
    model = _model_0_2(params) if OLDER else _config_0_3(params).build()
    width = model.state_dict()["layers.0.feed_forward.w1.weight"].shape[0]
    assert width == params["ffn_dim"], f"feed-forward width {width}, wanted {params['ffn_dim']}"
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(math.nan)
    return model.eval()


def register(params: Params) -> None:
    """Makes `interop` a flavour of this release; `FLAVOUR_FLAGS` then choose it."""
    if OLDER:
        from torchtitan.models.llama3 import llama3_args

        llama3_args["interop"] = _args_0_2(params)
        return

    from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
    from torchtitan.components.optimizer import default_adamw
    from torchtitan.models.llama3 import config_registry

    def llama3_interop() -> Any:
        config = config_registry.llama3_debugmodel()
        config.model_spec.flavor = "interop"
        config.model_spec.model = _config_0_3(params)
        loss = CrossEntropyLoss.Config(global_vocab_size=params["vocab_size"])
        config.optimizer = default_adamw(lr=LEARNING_RATE)
        config.loss = ChunkedLossWrapper.Config(loss_fn=loss)
        return config

    config_registry.llama3_interop = llama3_interop


def _args_0_2(p: Params) -> Any:
    """0.2.x has no head_dim (it is dim / n_heads) and no off switch for scaling but a factor of 1.

    The feed-forward width is 8 / 3 of dim, times a multiplier, rounded down to a whole number and up to
    a multiple. A multiple of the width itself, and a multiplier that lands just under it, give it exactly.
    """
    from torchtitan.models.llama3.model.args import RoPEScalingArgs, TransformerModelArgs

    scaling = p["rope_scaling"] or {"factor": 1.0}
    rope = {"scaling_factor" if k == "factor" else k: v for k, v in scaling.items()}
    return TransformerModelArgs(
        dim=p["dim"],
        n_layers=p["n_layers"],
        n_heads=p["n_heads"],
        n_kv_heads=p["n_kv_heads"],
        vocab_size=p["vocab_size"],
        multiple_of=p["ffn_dim"],
        ffn_dim_multiplier=(p["ffn_dim"] - 0.5) / int(8 * p["dim"] / 3),
        norm_eps=p["norm_eps"],
        rope_theta=p["rope_theta"],
        rope_scaling_args=RoPEScalingArgs(**rope),
        max_seq_len=p["max_seq_len"],
    )


def _model_0_2(p: Params) -> nn.Module:
    from torchtitan.models.llama3.model.model import Transformer

    return Transformer(_args_0_2(p))


def _config_0_3(p: Params) -> Any:
    """0.3.0 states every width outright, so a wide head (n_heads * head_dim != dim) can be said too."""
    from torchtitan.models.common import (
        ComplexRoPE,
        Embedding,
        Linear,
        RMSNorm,
        ScaledDotProductAttention,
    )
    from torchtitan.models.common.config_utils import make_ffn_config, make_gqa_config
    from torchtitan.models.llama3.model import Llama3Model, Llama3TransformerBlock

    init = {"weight": partial(nn.init.constant_, val=math.nan)}
    scaling = p["rope_scaling"] or {}
    rope = ComplexRoPE.Config(
        dim=p["head_dim"],
        max_seq_len=p["max_seq_len"],
        theta=p["rope_theta"],
        scaling="llama" if scaling else "none",
        **{"scaling_factor" if k == "factor" else k: v for k, v in scaling.items()},
    )

    def norm() -> Any:
        return RMSNorm.Config(normalized_shape=p["dim"], eps=p["norm_eps"], param_init=init)

    def block() -> Any:
        return Llama3TransformerBlock.Config(
            attention_norm=norm(),
            ffn_norm=norm(),
            attention=make_gqa_config(
                dim=p["dim"],
                n_heads=p["n_heads"],
                n_kv_heads=p["n_kv_heads"],
                head_dim=p["head_dim"],
                wqkv_param_init=init,
                wo_param_init=init,
                inner_attention=ScaledDotProductAttention.Config(),
                rope=rope,
                fuse_qkv=True,  # as every stock flavour has it
            ),
            feed_forward=make_ffn_config(
                dim=p["dim"], hidden_dim=p["ffn_dim"], w1_param_init=init, w2w3_param_init=init
            ),
        )

    return Llama3Model.Config(
        dim=p["dim"],
        vocab_size=p["vocab_size"],
        enable_weight_tying=p["tied"],
        tok_embeddings=Embedding.Config(
            num_embeddings=p["vocab_size"], embedding_dim=p["dim"], param_init=init
        ),
        norm=norm(),
        lm_head=Linear.Config(in_features=p["dim"], out_features=p["vocab_size"], param_init=init),
        layers=[block() for _ in range(p["n_layers"])],
    )
