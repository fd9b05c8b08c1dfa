"""TorchTitan's own conversion, both ways, in the release that is installed.

    python titan_convert.py SRC DST

The wheels lack the scripts, so this calls the same public functions in the same order as
scripts/checkpoint_conversion/convert_from_hf.py and convert_to_hf.py of github.com/pytorch/torchtitan:
build the model, let its adapter name the tensors, `dcp.load`, rename, `dcp.save`. As there, the model
is in float32, so from bf16 twice the bytes are written. The size is that of SRC's (or, for a
DCP, its receipt's) parameters, as a flavour beside the stock ones.
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2] / "interop"))

import titan_models
import torch
import torch.distributed.checkpoint as dcp


def params_of(source: Path) -> dict[str, Any]:
    """The parameters in the words of `titan_models`."""
    if (source / "config.json").exists():
        config = json.loads((source / "config.json").read_text())
        names = {
            "dim": "hidden_size",
            "n_layers": "num_hidden_layers",
            "n_heads": "num_attention_heads",
            "n_kv_heads": "num_key_value_heads",
            "head_dim": "head_dim",
            "ffn_dim": "intermediate_size",
            "vocab_size": "vocab_size",
            "norm_eps": "rms_norm_eps",
            "rope_theta": "rope_theta",
            "tied": "tie_word_embeddings",
        }
        found = {ours: config[theirs] for ours, theirs in names.items()}
    else:
        found = json.loads((source / "llamaconv.json").read_text())["params"]
    return found | {"rope_scaling": None, "max_seq_len": 2048}


def build(params: dict[str, Any]) -> tuple[Any, Any]:
    """The model, and the adapter that knows its names in both worlds."""
    if titan_models.OLDER:
        import torchtitan.protocols.train_spec as specs

        titan_models.register(params)
        spec = specs.get_train_spec("llama3")
        arguments = spec.model_args["interop"]
        return spec.model_cls(arguments), spec.state_dict_adapter(arguments, None)
    from torchtitan.models.llama3.state_dict_adapter import Llama3StateDictAdapter

    config = titan_models._config_0_3(params)
    return config.build(), Llama3StateDictAdapter(config, None)


@torch.inference_mode()
def main(source: Path, target: Path) -> None:
    with torch.device("cpu"):
        model, adapter = build(params_of(source))
    if titan_models.OLDER:
        from torchtitan.components.checkpoint import ModelWrapper
    else:
        from torchtitan.components.checkpointer import ModelWrapper
    state = ModelWrapper(model)._get_state_dict()
    if (source / ".metadata").exists():
        dcp.load(state, checkpoint_id=source)
        writer = dcp.HuggingFaceStorageWriter(
            target, save_distributed=True, enable_consolidation=True, thread_count_consolidation=5
        )
        dcp.save(adapter.to_hf(state), storage_writer=writer)
    else:
        named = adapter.to_hf(state)
        dcp.load(named, storage_reader=dcp.HuggingFaceStorageReader(path=str(source)))
        dcp.save(adapter.from_hf(named), checkpoint_id=target)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
