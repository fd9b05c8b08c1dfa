"""Other tools' formats are refused by name, with the tool that exports them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support import checkpoints
from torch.distributed.checkpoint import save

from llamaconv import RefusedError, Target, make_plan, open_checkpoint
from llamaconv.model.names import every_role

FOLDERS = {
    "global_step100/ zero_to_fp32.py latest": ("DeepSpeed", "python zero_to_fp32.py"),
    "mp_rank_00_model_states.pt": ("DeepSpeed", "zero_to_fp32.py"),
    "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt": ("DeepSpeed", "zero_to_fp32.py"),
    "mp_rank_00/ mp_rank_01/": ("Megatron", "Megatron-Bridge"),
    "common.pt __0_0.distcp": ("Megatron-Core", "slime"),
    "latest_checkpointed_iteration.txt iter_0000100/": ("Megatron-Core", "Megatron-Bridge"),
    "llama.nemo": ("NeMo", "llm.export_ckpt"),
    "model_world_size_8_rank_0.pt": ("verl", "python -m verl.model_merger merge"),
    "pytorch_model_fsdp_rank0.bin": ("FSDP", "SHARDED_STATE_DICT"),
    "model_rank_3.pt": ("FSDP", "one file per rank"),
    "__0_0.distcp __1_0.distcp": (".metadata", "not saved completely"),
    "model-rank-0-part-0.safetensors config.json": ("vLLM", "its own ranks"),
    "rank0.safetensors config.json": ("TensorRT-LLM", "made from"),
    "rank0.engine": ("TensorRT-LLM", "made from"),
    "_CHECKPOINT_METADATA manifest.ocdbt": ("Orbax", "MaxText"),
    "flax_model.msgpack config.json": ("Flax", "from_flax=True"),
    "tf_model.h5 config.json": ("TensorFlow", "from_tf=True"),
    "llama-q4.gguf": ("GGUF", "gguf_file=NAME"),
    "model.onnx": ("ONNX", "made from"),
    "llama.pte params.json": ("ExecuTorch", "made from"),
    "adapter_0.pt adapter_config.json": ("adapter", "Merge the adapter first"),
    "adapters.safetensors adapter_config.json": ("MLX", "mlx_lm.fuse"),
    "adapter_model.safetensors adapter_config.json": ("adapter", "cannot be merged"),
    "qmodel.pt": ("HQQ", "made from"),
    "lit_model.pth": ("LitGPT", "litgpt convert_from_litgpt"),
}


@pytest.mark.parametrize(("names", "said"), FOLDERS.items())
def test_folder_of_another_tool_is_named_with_the_remedy(
    tmp_path: Path, names: str, said: tuple[str, str]
) -> None:
    for name in names.split():
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).touch()
    with pytest.raises(RefusedError) as caught:
        open_checkpoint(tmp_path)
    (problem,) = caught.value.problems
    assert problem.message.startswith(f"{tmp_path}: ")
    assert names.split()[0].rstrip("/") in problem.message
    for words in said:
        assert words in problem.message


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("llama.nemo", "NeMo"),
        ("llama.gguf", "GGUF"),
        ("llama.pte", "ExecuTorch"),
        ("model_world_size_2_rank_0.pt", "verl"),
        ("model-rank-0-part-0.safetensors", "vLLM"),
    ],
)
def test_file_of_another_tool_is_named(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(RefusedError, match=words):
        open_checkpoint(tmp_path / name)


@pytest.mark.parametrize(
    ("endings", "scheme"),
    [
        (["scales", "biases"], "MLX"),
        (["scales"], "SpinQuant"),
        (["weight_scale", "weight_scale_2", "input_scale"], "NVFP4"),
    ],
)
def test_quantised_weights_are_one_problem_with_the_scheme(
    tmp_path: Path, endings: list[str], scheme: str
) -> None:
    weights = checkpoints.tensors()
    for layer in range(3):
        stem = f"model.layers.{layer}.mlp.up_proj"
        weights[f"{stem}.weight"] = torch.zeros(96, 8, dtype=torch.uint8)
        weights.update({f"{stem}.{ending}": torch.zeros(4) for ending in endings})
    plan = make_plan(open_checkpoint(checkpoints.write(tmp_path / "source", weights)))
    (problem,) = plan.errors
    assert scheme in problem.message
    assert f"{3 * len(endings)} tensors" in problem.message
    assert "unquantised" in problem.message


MEGATRON = "decoder.layers.self_attention.linear_qkv.weight embedding.word_embeddings.weight"


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (MEGATRON, "Megatron-Core"),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", "Merge the adapter"),
        ("mine.model.norm.weight mine.lm_head.weight", "'mine.' in front of a Llama's names"),
        ("model.embed_tokens.weight model.layers.0.mlp.gate_up_proj.weight", "Phi-3"),
        ("optimizer.state.norm.weight.exp_avg step", "only the trainer's state"),
    ],
)
def test_names_of_another_model_are_one_problem(tmp_path: Path, names: str, words: str) -> None:
    source = checkpoints.write(tmp_path / "source")
    state = {name: torch.ones(80, 64) for name in names.split()}
    save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    plan = make_plan(open_checkpoint(tmp_path / "dcp"), Target(to="hf", assets=str(source)))
    (problem,) = plan.errors
    assert words in problem.message


def test_weights_next_to_what_another_tool_left_are_read(tmp_path: Path) -> None:
    """A Trainer's folder with DeepSpeed's, FSDP's and TensorRT-LLM's files."""
    folder = checkpoints.write(tmp_path / "source", shards=1)
    (folder / "global_step10").mkdir()
    for name in ("zero_to_fp32.py", "rng_state_0.pth", "model.onnx"):
        (folder / name).touch()
    assert not open_checkpoint(folder).problems
    save_file({"a": torch.ones(2)}, folder / "rank0.safetensors")
    assert not open_checkpoint(folder).problems


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "model.pt"])
def test_names_of_torchtune_in_files_are_one_error_with_the_export(
    tmp_path: Path, name: str
) -> None:
    folder = checkpoints.write(tmp_path / "hf", shards=1)
    (folder / "model.safetensors").unlink()
    weights = {
        str(role.in_naming("torchtune", layer)): torch.ones(role.shape(checkpoints.GQA))
        for role, layer in every_role(checkpoints.GQA)
    }
    (save_file if name.endswith("safetensors") else torch.save)(weights, folder / name)  # type: ignore[operator]
    (error,) = make_plan(open_checkpoint(folder)).errors
    assert "torchtune" in error.message
    assert "tune_to_hf" in error.message


def test_state_dict_of_a_peft_model_is_one_error(tmp_path: Path) -> None:
    weights = {f"base_model.model.{name}": one for name, one in checkpoints.tensors().items()}
    front = "base_model.model.model.layers.0.self_attn.q_proj"
    weights[f"{front}.base_layer.weight"] = weights.pop(f"{front}.weight")
    weights[f"{front}.lora_A.default.weight"] = torch.ones(4, 64)
    (error,) = make_plan(open_checkpoint(checkpoints.write(tmp_path / "hf", weights))).errors
    assert "LoRA" in error.message
    assert "merge_and_unload" in error.message


def test_tables_of_quantised_modules_are_one_error_with_the_scheme(tmp_path: Path) -> None:
    weights = checkpoints.tensors()
    front = "model.layers.0.mlp.up_proj"
    del weights[f"{front}.weight"]
    weights |= {f"{front}.{ending}": torch.ones(2) for ending in ("W_q", "scale", "zero", "meta")}
    (error,) = make_plan(open_checkpoint(checkpoints.write(tmp_path / "hf", weights))).errors
    assert "1 weights are quantised, scheme HQQ" in error.message
    assert "4 tensors" in error.message
