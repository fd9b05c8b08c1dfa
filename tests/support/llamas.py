"""Parameters of Meta's published models, written out by hand: the package's own table is tested."""

from dataclasses import replace

from llamaconv.model.params import LlamaParams, RopeScaling

LLAMA_31_8B = LlamaParams(
    dim=4096,
    n_layers=32,
    n_heads=32,
    n_kv_heads=8,
    head_dim=128,
    ffn_dim=14336,
    vocab_size=128256,
    norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
)
LLAMA_3_8B = replace(LLAMA_31_8B, rope_scaling=None)
