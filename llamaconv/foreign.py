"""Names of tensors that are no Llama's: which family, wrapper or extension they are of.

One table, searched in order: the more telling pattern stands first. It only serves messages; a
family that is not in it is refused all the same.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from llamaconv.problems import some

# A pattern that at least one name has to contain, what such names are of, and the way out.
_MARKS: tuple[tuple[str, str, str], ...] = (
    (r"lora_[AB]|lora_magnitude", "an adapter (LoRA)", "merge the adapter first"),
    (r"^_orig_mod\.|\._orig_mod\.", "a model compiled by torch.compile", "save model._orig_mod"),
    (r"^module\.", "a model wrapped by DistributedDataParallel or DeepSpeed", "save model.module"),
    (r"_flat_param", "FSDP1 with flat parameters", "save with a full or sharded state dict"),
    (r"feed_forward\.w13\.", "a TorchTitan nightly with w1 and w3 fused (from September 2026)",
     "save with TorchTitan in Hugging Face's format"),
    (r"vision_|visual\.|multi_modal_projector|language_model\.", "a model with vision",
     "extract the language model first"),
    (r"kv_a_proj|kv_a_layernorm|wkv_a|kv_norm", "DeepSeek V2 or V3 (latent attention)", ""),
    (r"shared_expert|experts\.gate_up_proj", "Llama 4, Qwen-MoE or DeepSeek (mixture of experts)", ""),
    (r"block_sparse_moe|experts|router|moe\.", "Mixtral or another mixture of experts", ""),
    (r"pre_feedforward_layernorm", "Gemma 2 or 3", ""),
    (r"post_feedforward_layernorm", "OLMo 2", ""),
    (r"[qk]_norm", "Qwen 3 (norms on q and k)", ""),
    (r"self_attn\.qkv_proj|gate_up_proj", "Phi-3", ""),
    (r"attn\.c_attn|(^|\.)wte\.|(^|\.)wpe\.", "GPT-2", ""),
    (r"gpt_neox\.|attention\.query_key_value", "GPT-NeoX or Pythia", ""),
    (r"self_attention\.query_key_value|word_embeddings\.", "Falcon or BLOOM", ""),
    (r"A_log|mixer\.|\.ssm", "Mamba", ""),
    (r"encoder\.|EncDecAttention", "an encoder (BERT, T5, Whisper)", ""),
    (r"double_blocks|single_blocks", "FLUX", ""),
    (r"attention\.w[qkv]\.bias|qkv_linear\.w[qkv]\.bias|[qkv]_proj\.bias", "Qwen 2 (biases on q, k and v)", ""),
)  # fmt: skip


def family_of(names: Collection[str]) -> str:
    """What the names are of and the way out, as the rest of a sentence; empty where unknown."""
    for pattern, family, way_out in _MARKS:
        if any(re.search(pattern, name) for name in names):
            return f"{family}: {way_out}" if way_out else family
    return ""


def what_names_are(names: Collection[str]) -> str:
    """The message for a checkpoint whose names are of no naming that can be read."""
    shown = some(sorted(names), 4)
    if not names:
        return (
            "holds no tensor of a model; a save of the trainer's state alone, or none that finished"
        )
    if family := family_of(names):
        return f"its names are those of {family}. llamaconv converts Llama only ({shown})"
    return f"names of no known TorchTitan generation: {shown}"
