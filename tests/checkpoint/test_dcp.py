"""DCP folders as they are read: what torch wrote, what it did not, and what must not run."""

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import checkpoints
from support.imported import imported_by
from torch.distributed.checkpoint import save

from llamaconv import RefusedError, Target, make_plan, open_checkpoint
from llamaconv.checkpoint.reader import PieceReader
from llamaconv.convert.convert import Conversion


def test_our_target_opens_with_its_generation_layout_and_parameters(
    source: Path, convert: Callable[..., Conversion]
) -> None:
    for generation, layout in (("titan-0.2", "half_split"), ("titan-0.3", "interleaved")):
        done = convert(source, name=generation, generation=generation, rope=layout, shards=2)
        checkpoint = open_checkpoint(done.target)
        assert not checkpoint.problems
        assert checkpoint.generation == generation
        assert checkpoint.rope == layout
        assert checkpoint.params == done.plan.params
        assert checkpoint.total_bytes == open_checkpoint(source).total_bytes


def test_dcp_and_metas_files_are_opened_without_torch(
    source: Path, convert: Callable[..., Conversion]
) -> None:
    for to in ("dcp", "meta"):
        target = convert(source, name=to, to=to, verified=False).target
        look = f"import llamaconv; llamaconv.open_checkpoint({str(target)!r})"
        assert "torch" not in imported_by(look)


def test_bytes_of_what_torch_saved_are_where_we_say(tmp_path: Path) -> None:
    state = {
        "norm.weight": torch.randn(7),
        "output.weight": torch.randn(5, 7, dtype=torch.float64),
        "tok_embeddings.weight": torch.randn(5, 7).to(torch.bfloat16),
    }
    save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    checkpoint = open_checkpoint(tmp_path / "dcp")
    assert checkpoint.generation == "titan-0.2"
    with PieceReader() as reader:
        for name, tensor in checkpoint.tensors.items():
            buffer = bytearray(tensor.nbytes)
            reader.read_rows(tensor, 0, tensor.n_rows, memoryview(buffer))
            assert bytes(buffer) == state[name].view(torch.uint8).numpy().tobytes()


def test_trainer_state_is_ignored_and_listed(tmp_path: Path) -> None:
    state = {
        "norm.weight": torch.randn(7),
        "optimizer": {"state": {"norm.weight": {"step": torch.tensor(3.0)}}},
        "train_state": {"step": 3},
        "freqs_cis": torch.randn(4, 2),
    }
    save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    checkpoint = open_checkpoint(tmp_path / "dcp")
    assert list(checkpoint.tensors) == ["norm.weight"]
    assert len(checkpoint.ignored) == 3
    assert not checkpoint.problems


@pytest.mark.parametrize("key", ["ema", "model_ema", "app.ema_state"])
def test_complete_model_in_a_trainers_state_is_one_warning(tmp_path: Path, key: str) -> None:
    weights = checkpoints.tensors()
    average = {f"{key}.module.{name}": weight * 2 for name, weight in weights.items()}
    steps = {f"optimizer.state.{name}.step": torch.tensor(3.0) for name in weights}
    save({**weights, **average, **steps}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    checkpoint = open_checkpoint(tmp_path / "dcp")
    assert checkpoint.tensors.keys() == weights.keys()
    (said,) = checkpoint.problems
    assert said.level == "warning"
    assert f"{len(weights)} tensors under {key.removeprefix('app.')!r}" in said.message
    save(average, checkpoint_id=tmp_path / "alone", no_dist=True)
    (error,) = open_checkpoint(tmp_path / "alone").errors
    assert f"{len(weights)} tensors under" in error.message


@pytest.mark.parametrize("cut", [True, False])
def test_cut_or_missing_file_is_one_problem(
    source: Path, convert: Callable[..., Conversion], cut: bool
) -> None:
    target = convert(source, verified=False, shards=3).target
    file = target / "__0_1.distcp"
    if cut:
        file.write_bytes(file.read_bytes()[:1000])
    else:
        file.unlink()
    errors = open_checkpoint(target).errors
    assert len(errors) == 1
    assert "cut to 1000 of" in str(errors[0]) if cut else "not found" in str(errors[0])
    assert "parts of 111 tensors" in str(errors[0])
    with pytest.raises(RefusedError, match=r"__0_1\.distcp"):
        make_plan(open_checkpoint(target)).raise_for_errors()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a.b", "names belong to no known TorchTitan generation: a.b"),
        ("transformer.h.0.attn.c_attn.weight", "belong to GPT-2"),
        ("model.layers.0.post_feedforward_layernorm.weight", "belong to OLMo 2"),
        ("model.layers.1.block_sparse_moe.gate.weight", "belong to Mixtral"),
        ("layers.0.attention.wkv_a.weight", "belong to DeepSeek"),
        ("decoder.layers.0.self_attention.linear_qkv.weight", "Megatron-Bridge"),
        ("transformer.h.0.norm_1.weight", "litgpt convert_from_litgpt"),
        ("layers.0.attn.q_proj.lora_magnitude_vector", "Merge the adapter"),
        ("base_model.model.prompt_encoder.default.embedding.weight", "Merge the adapter"),
        ("optimizer.state.a", "no tensor of a model"),
    ],
)
def test_another_family_is_named(tmp_path: Path, name: str, words: str) -> None:
    save({name: torch.ones(2, 2)}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert words in str(open_checkpoint(tmp_path / "dcp").errors[0])


def test_norms_that_are_all_one_look_like_a_random_initialisation(
    tmp_path: Path, source: Path, convert: Callable[..., Conversion]
) -> None:
    def warned(folder: Path) -> bool:
        plan = make_plan(open_checkpoint(folder), Target(assets=str(source)))
        assert not plan.errors
        return any("random initialisation: all 25 norms" in str(p) for p in plan.problems)

    assert not warned(convert(source, verified=False).target)
    weights = checkpoints.tensors()
    fresh = {n: torch.ones_like(w) if w.ndim == 1 else w for n, w in weights.items()}
    assert warned(convert(checkpoints.write(tmp_path / "fresh", fresh), "new").target)


def test_metadata_that_would_run_code_is_refused_by_name_and_does_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    (tmp_path / ".metadata").write_bytes(
        b"cos\nsystem\n(S'touch " + str(trace).encode() + b"'\ntR."
    )
    with pytest.raises(RefusedError, match=r"\.metadata: it asks for os\.system"):
        open_checkpoint(tmp_path)
    assert not trace.exists()
    pickle.loads((tmp_path / ".metadata").read_bytes())
    assert trace.exists(), "the payload works, so the refusal was what stopped it"


@pytest.mark.parametrize("content", [b"", b"\x80", b"garbage", pickle.dumps({"a": 1}), bytes(999)])
def test_invalid_metadata_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(RefusedError, match=r"\.metadata"):
        open_checkpoint(tmp_path)
