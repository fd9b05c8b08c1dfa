"""Valid tiny checkpoints of every format, of any shape that a Llama can have; for ``test_fuzz``.

A model is its parameters and its tensors under Hugging Face's names. `write` puts it down as any
of `KINDS` with torch and safetensors alone, and `expected` says what it is in another format:
names by the table of `keys`, rows by index arithmetic.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.checkpoint import save

from llamaconv import Target, convert_checkpoint, make_plan, open_checkpoint
from llamaconv.model.config_json import to_config
from llamaconv.model.names import identify
from llamaconv.model.params import LlamaParams
from llamaconv.model.params_json import META_SCALING, to_params_json
from llamaconv.plan.target import CHOICES
from support import checkpoints
from support.folders import of_main

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Model:
    """``cuts`` is how many files or chunks it is written as, where that is possible."""

    params: LlamaParams
    dtype: torch.dtype
    kind: str
    generation: str
    cuts: int

    @property
    def weights(self) -> dict[str, Tensor]:
        made = checkpoints.tensors(self.params, self.dtype)
        if self.params.tied:
            del made["lm_head.weight"]
        return made


@st.composite
def models(draw: Callable[..., int]) -> Model:
    """Any Llama of some kilobytes, in any format that can hold it."""
    n_kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    n_heads, head_dim = n_kv_heads * group, draw(st.sampled_from((2, 4, 6, 8, 16)))
    wide = draw(st.booleans())
    params = LlamaParams(
        dim=draw(st.integers(1, 20)) if wide else n_heads * head_dim,
        n_layers=draw(st.integers(1, 2)),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        ffn_dim=draw(st.integers(1, 20)),
        vocab_size=draw(st.integers(2, 20)),
        norm_eps=draw(st.sampled_from((1e-5, 1e-6))),
        rope_theta=draw(st.sampled_from((10000.0, 500000.0, 1234.5))),
        rope_scaling=draw(st.sampled_from((None, META_SCALING))),
        tied=draw(st.booleans()),
        max_position=draw(st.sampled_from((4, 8))),
    )
    kinds = [kind for kind in KINDS if kind != "meta" or params.q_rows == params.dim]
    return Model(
        params,
        draw(st.sampled_from(DTYPES)),
        draw(st.sampled_from(kinds)),
        draw(st.sampled_from(CHOICES["generation"])),
        draw(st.integers(1, 3)),
    )


def in_naming(
    model: Model, weights: dict[str, Tensor], naming: str, layout: str
) -> dict[str, Tensor]:
    """Tensors (Hugging Face's names and rows) as another naming and layout have them, head included."""
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    found = {}
    for name, tensor in {**weights, "lm_head.weight": head}.items():
        known = identify(name, "huggingface")
        assert known is not None
        role, layer = known
        if role.heads and layout == "interleaved":
            size = model.params.head_dim
            # Row 2i of a head is its row i, row 2i + 1 is row i + half.
            order = [i // 2 + size // 2 * (i % 2) for i in range(size)]
            tensor = tensor[[at + row for at in range(0, len(tensor), size) for row in order]]
        found[role.in_naming(naming, layer) or ""] = tensor.contiguous()
    return found


def _safetensors(folder: Path, model: Model) -> None:
    weights = model.weights
    shards = min(model.cuts, len(weights))
    checkpoints.write(folder, weights, to_config(model.params, None), shards=shards)


def _bin(folder: Path, model: Model) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(to_config(model.params, None)))
    weights, names = model.weights, {}
    for number in range(model.cuts):
        file = f"pytorch_model-{number + 1:05d}-of-{model.cuts:05d}.bin"
        part = {name: weights[name] for name in list(weights)[number :: model.cuts]}
        torch.save(part, folder / file)
        names |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": names}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def _meta(folder: Path, model: Model) -> None:
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(to_params_json(model.params)))
    sizes = ("n_heads", "n_kv_heads", "ffn_dim", "vocab_size")
    fits = all(getattr(model.params, size) % model.cuts == 0 for size in sizes)
    files = model.cuts if fits else 1
    parts: list[dict[str, Tensor]] = [{} for _ in range(files)]
    for name, tensor in in_naming(model, model.weights, "meta", "interleaved").items():
        axis = 1 if name.split(".")[-2] in ("wo", "w2") else 0
        cut = torch.chunk(tensor, files, axis) if tensor.ndim == 2 else [tensor] * files
        for part, piece in zip(parts, cut, strict=True):
            part[name] = piece.clone()
    for number, part in enumerate(parts):
        torch.save(part, folder / f"consolidated.{number:02d}.pth")


def _dcp(folder: Path, model: Model) -> None:
    """What torch saves; without a receipt, so the parameters come from beside it."""
    naming = "titan-0.3" if model.generation == "titan-main" else model.generation
    state = in_naming(model, model.weights, naming, "interleaved")
    if model.generation == "titan-main":
        state = of_main(state, model.params)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled")
        save(state, checkpoint_id=folder, no_dist=True)
    (folder / "config.json").write_text(json.dumps(to_config(model.params, None)))


def _ours(folder: Path, model: Model) -> None:
    """What llamaconv writes, with its receipt, in chunks."""
    source = folder.with_name(f"{folder.name}-source")
    _safetensors(source, model)
    target = Target(generation=model.generation, shards=model.cuts)
    convert_checkpoint(make_plan(open_checkpoint(source), target), folder, verified=False)


KINDS: dict[str, Callable[[Path, Model], None]] = {
    "safetensors": _safetensors,
    "bin": _bin,
    "meta": _meta,
    "dcp": _dcp,
    "ours": _ours,
}


def write(folder: Path, model: Model) -> Path:
    KINDS[model.kind](folder, model)
    return folder


def assets(folder: Path, model: Model) -> str:
    """The option that a source needs which names no parameters."""
    return str(folder) if model.kind == "dcp" else ""
