"""Recognise what is not converted: other tools' formats, adapters, other model families.

One table, searched in order: more specific rows come first. Rows of three kinds: other models and
formats, the tables next to quantised weights, and the heads of other tasks. It only serves messages;
what is not in it is refused all the same.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from llamaconv.model.families import FAMILIES
from llamaconv.model.names import NAMINGS, best_naming, identify
from llamaconv.report.errors import first_few

_LLAMA_ONLY = f"llamaconv converts {', '.join(one.title for one in FAMILIES.values())} only"
_TORCHTUNES = r"layers\.\d+\.(?:(?:sa|mlp)_norm\.scale|attn\.output_proj\.)"
_UNQUANTISED = "Quantised weights are not converted; use the repository's unquantised weights"
_ORIGINAL = "It cannot be converted back; use the weights that it was made from"


@dataclass(frozen=True)
class Other:
    """One row: how something that is not converted is recognised, and what to do about it.

    Attributes:
        what: What it is.
        remedy: What to do, as a sentence; ``{path}`` stands for the folder or file.
        tensors: A regular expression; one name of a tensor contains it.
        files: Patterns of names; the folder has one such file or folder.
        looks_like_ours: Its files also match the patterns of a format that is read.
        kind: "model" for another model or format, which the names of all tensors show; "scheme"
            for the tables of quantised weights and "head" for that of another task, which a Llama's
            tensors may be next to.
        least: How many such files it has at least; fewer may be somebody else's.
    """

    what: str
    remedy: str
    tensors: str = ""
    files: tuple[str, ...] = ()
    looks_like_ours: bool = False
    kind: Literal["model", "scheme", "head"] = "model"
    least: int = 1

    def names(self, names: Iterable[str]) -> list[str]:
        """Return the tensors of ``names`` by which it is recognised."""
        return [name for name in names if self.tensors and re.search(self.tensors, name)]

    def its_files(self, names: Iterable[str]) -> list[str]:
        """Return the files of ``names`` by which it is recognised."""
        found = [name for name in names if any(fnmatchcase(name, one) for one in self.files)]
        return found if len(found) >= self.least else []


def _family(what: str, tensors: str) -> Other:
    return Other(what, _LLAMA_ONLY, tensors)


def _scheme(what: str, endings: str) -> Other:
    """Return a scheme of quantisation, by the endings of its tables."""
    return Other(what, _UNQUANTISED, rf"(?:{endings})\Z", kind="scheme")


def _head(what: str, names: str) -> Other:
    """Return a head of another task, by whole names; anything may be in front."""
    return Other(what, "", rf"\A(?:.+\.)?(?:{names})\Z", kind="head")


_OTHERS = (
    # Adapters.
    Other(
        "an adapter of MLX",
        "Merge the adapter first, with mlx_lm.fuse --model MODEL --adapter-path {path}, and give "
        "the merged model",
        files=("adapters.safetensors", "[0-9]*_adapters.safetensors"),
        looks_like_ours=True,
    ),
    Other(
        "adapter weights (LoRA and the like)",
        "Merge the adapter first, and give the merged model (a prompt of prompt or prefix tuning "
        "cannot be merged: give the model that it is for)",
        r"lora_|\.lora\.|(?:^|\.)adapters?\.|prompt_(?:embeddings|encoder)|[._](?:ia3|b?oft|hada|lokr|vera)_",
        files=("adapter_*",),
        looks_like_ours=True,
    ),
    # A Llama in the format of another trainer.
    Other(
        "torchtune's own naming, which is read in distributed checkpoints only",
        "Export the model in Hugging Face's format first, with torchtune's FullModelHFCheckpointer "
        "or torchtune.models.convert_weights.tune_to_hf",
        _TORCHTUNES,
    ),
    Other(
        "a checkpoint of DeepSpeed",
        "Run zero_to_fp32.py first, which DeepSpeed saves next to global_stepN: python "
        "zero_to_fp32.py FOLDER OUTPUT, and give OUTPUT with the model's config.json",
        files=(
            "global_step[0-9]*", "zero_to_fp32.py", "mp_rank_*_model_states.pt", "zero_pp_rank_*",
            "*_optim_states.pt", "layer_[0-9]*-model_*states.pt",
        ),
    ),
    Other(
        "Megatron's files, one per rank (mp_rank_NN)",
        "Export the model in Hugging Face's format first, with Megatron-Bridge "
        "(AutoBridge.export_ckpt) or the trainer's own converter",
        files=("mp_rank_[0-9]*", "model_optim_rng.pt", "distrib_optim.pt"),
    ),
    Other(
        "Megatron-Core (torch_dist)",
        "Export the model in Hugging Face's format first, with Megatron-Bridge "
        "(AutoBridge.export_ckpt), NeMo (llm.export_ckpt), slime's "
        "tools/convert_torch_dist_to_hf.py or python -m verl.model_merger merge --backend megatron",
        r"linear_(?:qkv|fc1|fc2|proj)\.|(?:^|\.)decoder\.final_layernorm|"
        r"language_model\.encoder\.(?:layers|final)",
        files=("common.pt", "latest_checkpointed_iteration.txt"),
    ),
    Other(
        "NeMo",
        "Export the model in Hugging Face's format first, with NeMo (llm.export_ckpt; before "
        "NeMo 2, scripts/checkpoint_converters/convert_llama_nemo_to_hf.py)",
        files=("*.nemo", "model_weights.ckpt", "model_config.yaml"),
    ),
    Other(
        "files of ranks, as verl saves FSDP's: each rank has its part of every tensor",
        "Merge them first: python -m verl.model_merger merge --backend fsdp --local_dir {path} "
        "--target_dir OUTPUT, and give OUTPUT",
        files=("*_world_size_[0-9]*_rank_[0-9]*.pt",),
    ),
    Other(
        "FSDP's local state, one file per rank: each has its part of flat parameters",
        "Save it again with FSDP's state_dict_type FULL_STATE_DICT or SHARDED_STATE_DICT",
        r"_?flat_param",
        files=("*[-_.]rank[-_0-9]*.bin", "*[-_.]rank[-_0-9]*.pt", "*[-_.]rank[-_0-9]*.pth"),
        looks_like_ours=True,
    ),
    Other(
        ".distcp files but no .metadata",
        "The distributed checkpoint was not saved completely (each rank has its part, and "
        ".metadata is written last), or the download left out the hidden file",
        files=("*.distcp",),
    ),
    Other(
        "files of ranks, as torch_checkpointing saves them, but no metadata.pkl",
        "It says which part of which tensor each file has, and is written for items with a resharder "
        "alone. Copy it from where the checkpoint was saved, or save again with "
        "ItemSpec(resharder=DefaultResharder()) for the model",
        files=("model_[0-9].pt", "model_[0-9]*[0-9].pt", "model_[0-9].safetensors",
               "model_[0-9]*[0-9].safetensors"),
        looks_like_ours=True,
        least=2,
    ),
    Other(
        "vLLM's sharded state, which is cut and fused for its own ranks",
        "Use the model that vLLM loaded when it saved this",
        files=("model-rank-[0-9]*-part-[0-9]*.safetensors",),
        looks_like_ours=True,
    ),
    Other(
        "a checkpoint or an engine of TensorRT-LLM",
        _ORIGINAL,
        r"vocab_embedding\.weight",
        files=("rank[0-9]*.safetensors", "*.engine", "*.plan"),
        looks_like_ours=True,
    ),
    Other(
        "LitGPT",
        "Export it first: litgpt convert_from_litgpt FOLDER OUTPUT",
        r"\.h\.\d+\.(?:norm_1|attn\.attn|mlp\.fc_1)\.",
        files=("lit_model.pth*",),
    ),
    Other(
        "nanotron",
        "Export it first, with nanotron's examples/llama/convert_nanotron_to_hf.py",
        r"token_position_embeddings|\.pp_block\.",
        files=("checkpoint_metadata.json",),
    ),
    Other(
        "Orbax (JAX)",
        "Export the model in Hugging Face's format first, with the framework that trained it, "
        "such as MaxText's to_huggingface",
        files=("_CHECKPOINT_METADATA", "*.orbax-checkpoint*", "manifest.ocdbt", "ocdbt.process_*"),
    ),
    Other(
        "Flax weights",
        "Load them with transformers before version 5 (from_flax=True) and save_pretrained",
        files=("*.msgpack", "*.msgpack.index.json"),
    ),
    Other(
        "TensorFlow weights",
        "Load them with transformers before version 5 (from_tf=True) and save_pretrained",
        files=("tf_model*.h5", "*.h5", "*.h5.index.json", "saved_model.pb"),
    ),
    # What cannot be trained further.
    Other(
        "GGUF",
        "Use the weights that it was made from; or load it with transformers "
        "(from_pretrained(FOLDER, gguf_file=NAME)) and save_pretrained; what quantising lost stays lost",
        files=("*.gguf", "*.ggml"),
    ),
    Other("ONNX", _ORIGINAL, files=("*.onnx", "*.onnx_data", "onnx")),
    Other("a program for ExecuTorch", _ORIGINAL, files=("*.pte",)),
    Other("OpenVINO", _ORIGINAL, files=("openvino_model.*",)),
    Other("Core ML", _ORIGINAL, files=("*.mlpackage", "*.mlmodel", "*.mlmodelc")),
    Other("LiteRT (TFLite)", _ORIGINAL, files=("*.tflite", "*.task", "*.litertlm")),
    Other("MLC", _ORIGINAL, files=("mlc-chat-config.json", "ndarray-cache.json", "params_shard_*.bin")),
    Other("MLX weights before safetensors", _ORIGINAL, files=("weights.npz", "weights.*.npz")),
    Other("HQQ's quantised weights", _ORIGINAL, files=("qmodel.pt",)),
    # Other models.
    Other("a model with vision", "Extract the language model first",
          r"vision_|visual\.|multi_modal_projector|language_model\."),
    _family("DeepSeek V2 or V3 (latent attention)", r"kv_a_proj|kv_a_layernorm|wkv_a|kv_norm"),
    _family("Llama 4, Qwen-MoE or DeepSeek (mixture of experts)", r"shared_expert|experts\.gate_up_proj"),
    _family("Mixtral or another mixture of experts", r"block_sparse_moe|experts|router|moe\."),
    _family("Gemma 2 or 3", r"pre_feedforward_layernorm"),
    _family("OLMo 2", r"post_feedforward_layernorm"),
    _family("Phi-3", r"self_attn\.qkv_proj|gate_up_proj"),
    _family("GPT-2", r"attn\.c_attn|(^|\.)wte\.|(^|\.)wpe\."),
    _family("GPT-NeoX or Pythia", r"gpt_neox\.|attention\.query_key_value"),
    _family("Falcon or BLOOM", r"self_attention\.query_key_value|word_embeddings\."),
    _family("Mamba", r"A_log|mixer\.|\.ssm"),
    _family("an encoder (BERT, T5, Whisper)", r"encoder\.|EncDecAttention"),
    _family("FLUX", r"double_blocks|single_blocks"),
    # Quantised weights. The first scheme of which a checkpoint has a table names that of all.
    _scheme("bitsandbytes 4 bit", r"\.quant_state\.bitsandbytes__\w+|\.(?:nested_)?(?:absmax|quant_map)"),
    _scheme("bitsandbytes int8", r"\.SCB|\.weight_format"),
    _scheme("block-wise fp8", r"\.weight_scale_inv"),
    _scheme("NVFP4 (ModelOpt)", r"\.weight_scale_2"),
    _scheme("compressed-tensors", r"\.(?:weight|input)_(?:packed|shape|zero_point|g_idx|global_scale)"),
    _scheme("fp8 or int8 (compressed-tensors)", r"\.(?:(?:weight|input|[qkv]|output)_scale|activation_scale)"),
    _scheme("GPTQ", r"\.g_idx"),
    _scheme("GPTQ or AWQ", r"\.q(?:weight|zeros)"),
    _scheme("MLX (mlx_lm.convert --dequantize makes plain weights of it)", r"\.biases"),
    _scheme("AQLM", r"\.(?:codes|codebooks)"),
    _scheme("HQQ", r"\.W_q"),
    _scheme("quanto", r"\._(?:data|scale|shift)"),
    _scheme("EETQ", r"\.weight_scales"),
    _scheme("ExLlama", r"\.(?:q_(?:weight|scale|scale_max|perm|invperm|groups|group_map)|trellis|su[hv]|sv[hv])"),
    _scheme("QLoRA of Meta, for ExecuTorch", r"\.adaptor\.[AB]\.weight"),
    _scheme("GPTQ, AWQ, MLX or SpinQuant of Meta (for ExecuTorch)", r"\.scales"),
    # Heads of other tasks: the class that has such a head.
    _head("AutoModelForCausalLMWithValueHead of TRL (a value head)", r"v_head\..+"),
    _head("LlamaForSequenceClassification (a reward model or a classifier)", r"score\.(?:weight|bias)"),
    _head("LlamaForTokenClassification (a classifier of tokens)", r"classifier\.(?:weight|bias)"),
    _head("LlamaForQuestionAnswering", r"qa_outputs\.(?:weight|bias)"),
    _head(
        "a reward or value model",
        r"(?:value|reward|regression|rm|scalar|critic|cls|classification)_?(?:head|layer|model)s?\..+",
    ),
    _head("Medusa (further heads that predict later tokens)", r"medusa_heads?\..+"),
)  # fmt: skip

OTHER_HEADS = tuple(row for row in _OTHERS if row.kind == "head")
_SCHEMES = tuple(row for row in _OTHERS if row.kind == "scheme")
_TABLE = re.compile(rf"(.+?)(?:\.weight)?(?:{'|'.join(row.tensors for row in _SCHEMES)})")


def quantised_module(name: str) -> str | None:
    """Return the module whose quantised weight a table of this name belongs to, if any."""
    match = _TABLE.fullmatch(name)
    return match and match[1]


def scheme_of(tables: Collection[str]) -> Other:
    """Return the scheme of quantised weights, by the names of their tables, one of which has one."""
    return next(row for row in _SCHEMES if row.names(tables))


def other_of(names: Collection[str]) -> Other | None:
    """Return what the tensor names belong to; None if it is unknown."""
    return next((row for row in _OTHERS if row.kind == "model" and row.names(names)), None)


def what_names_are(names: Collection[str]) -> str:
    """Return the error message for tensor names that match no supported naming scheme."""
    if found := other_of(names):
        shown = first_few(found.names(sorted(names)), 4)
        return f"the tensor names belong to {found.what} ({shown}). {found.remedy}"
    first = min(names)
    for at in (at for at, letter in enumerate(first) if letter == "."):
        front = first[: at + 1]
        bare = [name.removeprefix(front) for name in names if name.startswith(front)]
        fitting = best_naming(bare, NAMINGS) if len(bare) == len(names) else None
        if fitting and all(identify(name, fitting) for name in bare):
            return (
                f"the tensor names have {front!r} in front of a Llama's names ({first}). Save the "
                "model's own state_dict(), without it"
            )
    return (
        f"the tensor names belong to no known TorchTitan generation: {first_few(sorted(names), 4)}. "
        "Names of a Llama by TorchTitan, transformers, Meta and torchtune are read"
    )


def what_files_are(path: object, names: Collection[str], only_lookalikes: bool = False) -> str:
    """Return the error message for files that are not a checkpoint that can be read.

    Args:
        path: The folder or the file, for the remedy.
        names: The names in the folder, or the name of the file.
        only_lookalikes: Look only for files that a format that is read may have too, and which are
            all of ``names``.

    Returns:
        The message without ``path`` in front; "" if the files are unknown.
    """
    for row in _OTHERS:
        found = row.its_files(names)
        if only_lookalikes and not (row.looks_like_ours and len(found) == len(names)):
            continue
        if found:
            shown = first_few(sorted(found), 3)
            return f"found {row.what} ({shown}). {row.remedy.replace('{path}', str(path))}"
    return ""
