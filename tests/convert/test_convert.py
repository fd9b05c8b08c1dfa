"""Conversions, read back by torch and compared with what safetensors and einops say."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import einops
import pytest
import torch
from safetensors.torch import load_file
from support import checkpoints
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llamaconv import (
    FailedError,
    RefusedError,
    Target,
    convert_checkpoint,
    make_plan,
    open_checkpoint,
)
from llamaconv.checkpoint.reader import PieceReader
from llamaconv.convert import engine
from llamaconv.convert.convert import Conversion
from llamaconv.model.names import ROLES, identify
from llamaconv.model.params import LlamaParams
from llamaconv.notebook.sample_rows import sample_rows

Load = Callable[[Path], dict[str, Tensor]]
Convert = Callable[..., Conversion]

WIDE = replace(checkpoints.GQA, dim=48, n_heads=4, n_kv_heads=2, head_dim=16)
MHA = replace(checkpoints.GQA, n_kv_heads=8)
MQA = replace(checkpoints.GQA, n_kv_heads=1)
SHAPES = {"GQA": checkpoints.GQA, "MHA": MHA, "MQA": MQA, "wide heads": WIDE}


def write(folder: Path, params: LlamaParams, dtype: torch.dtype = torch.bfloat16) -> Path:
    return checkpoints.write(
        folder,
        checkpoints.tensors(params, dtype),
        hidden_size=params.dim,
        num_attention_heads=params.n_heads,
        num_key_value_heads=params.n_kv_heads,
        head_dim=params.head_dim,
    )


def expected(folder: Path, params: LlamaParams, generation: str = "titan-0.3") -> dict[str, Tensor]:
    """The target by whole tensors and einops, from the files as safetensors reads them."""
    named: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        for name, weight in load_file(file).items():
            known = identify(name, "huggingface")
            assert known is not None
            if known[0].heads:
                heads = getattr(params, known[0].heads)
                weight = einops.rearrange(weight, "(h two f) c -> (h f two) c", h=heads, two=2)
            named[known[0].in_naming(generation, known[1]) or ""] = weight
    return named


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert found[name].dtype == weight.dtype, name
        assert torch.equal(found[name], weight), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", SHAPES)
def test_every_kind_of_attention_is_converted_exactly(
    tmp_path: Path, convert: Convert, load_dcp: Load, kind: str, dtype: torch.dtype
) -> None:
    params = SHAPES[kind]
    folder = write(tmp_path / "hf", params, dtype)
    done = convert(folder)
    assert_same(load_dcp(done.target), expected(folder, params))
    assert done.verification is not None
    assert done.verification.ok


@pytest.mark.parametrize("generation", ["titan-0.3", "titan-0.2", "titan-2024"])
def test_every_generation(source: Path, convert: Convert, load_dcp: Load, generation: str) -> None:
    done = convert(source, generation=generation)
    assert_same(load_dcp(done.target), expected(source, checkpoints.GQA, generation))


def test_half_split_keeps_the_rows(source: Path, convert: Convert, load_dcp: Load) -> None:
    found = load_dcp(convert(source, rope="half_split").target)
    weights = checkpoints.tensors()
    for role in ("wq", "wk"):
        name = ROLES[role].in_naming("titan-0.3", 5)
        assert torch.equal(
            found[name or ""], weights[ROLES[role].in_naming("huggingface", 5) or ""]
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_casts_are_torchs_casts(
    tmp_path: Path, convert: Convert, load_dcp: Load, dtype: str
) -> None:
    folder = write(tmp_path / "hf", checkpoints.GQA, torch.float32)
    wanted = {
        name: weight.to(getattr(torch, dtype))
        for name, weight in expected(folder, checkpoints.GQA).items()
    }
    assert_same(load_dcp(convert(folder, dtype=dtype).target), wanted)


def test_values_that_overflow_are_an_error_with_their_count(tmp_path: Path) -> None:
    weights = checkpoints.tensors(dtype=torch.float32)
    weights["model.norm.weight"][:5] = 70000.0
    weights["lm_head.weight"][3, 3] = -1e9
    weights["lm_head.weight"][4, 4] = float("inf")
    plan = make_plan(
        open_checkpoint(checkpoints.write(tmp_path / "hf", weights)), Target(dtype="float16")
    )
    with pytest.raises(FailedError) as caught:
        convert_checkpoint(plan, tmp_path / "target")
    assert "model.norm.weight: 5 finite values become infinite in float16" in str(caught.value)
    assert "lm_head.weight: 1 finite values" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_nan_keeps_its_bits(tmp_path: Path, convert: Convert, load_dcp: Load) -> None:
    weights = checkpoints.tensors()
    q = weights["model.layers.0.self_attn.q_proj.weight"]
    q.view(torch.int16)[3, :2] = torch.tensor([0x7FC1, -1], dtype=torch.int16)
    folder = checkpoints.write(tmp_path / "hf", weights)
    found = load_dcp(convert(folder, verified=False).target)
    name = "layers.0.attention.qkv_linear.wq.weight"
    assert found[name].view(torch.int16)[6, :2].tolist() == [0x7FC1, -1]


@pytest.mark.parametrize("shards", [1, 2, 3, 5, 70])
def test_row_chunks_are_those_of_torch_chunk(
    tmp_path: Path, convert: Convert, load_dcp: Load, shards: int
) -> None:
    params = replace(checkpoints.GQA, n_layers=2)
    source = checkpoints.write_model(tmp_path / "source", params)
    from torch.distributed.checkpoint import FileSystemReader

    done = convert(source, shards=shards, verified=shards < 10)
    wanted = expected(source, params)
    assert_same(load_dcp(done.target), wanted)
    metadata = FileSystemReader(done.target).read_metadata()
    for name, entry in metadata.state_dict_metadata.items():
        rows = [chunk.sizes[0] for chunk in entry.chunks]
        assert rows == [len(part) for part in torch.chunk(wanted[name], shards)]
    # Chunk i of every tensor lies in file i, so that a rank reads one file.
    most = max(len(torch.chunk(weight, shards)) for weight in wanted.values())
    assert len(list(done.target.glob("*.distcp"))) == most


def test_a_block_smaller_than_a_head_and_one_larger_than_the_tensor(
    source: Path, tmp_path: Path, load_dcp: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(open_checkpoint(source), Target(shards=3))
    wanted = expected(source, checkpoints.GQA)
    for n_bytes in (1, 700, 1 << 30):
        monkeypatch.setattr(engine, "_BLOCK_BYTES", n_bytes)
        convert_checkpoint(plan, tmp_path / str(n_bytes), verified=False)
        assert_same(load_dcp(tmp_path / str(n_bytes)), wanted)


def test_what_transformers_saves_is_converted(
    tmp_path: Path, convert: Convert, load_dcp: Load
) -> None:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=80,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "hf", max_shard_size="60KB")
    done = convert(tmp_path / "hf")
    found = load_dcp(done.target)
    embedding = model.get_input_embeddings().weight
    assert torch.equal(found["tok_embeddings.weight"], embedding)
    assert torch.equal(found["lm_head.weight"], embedding)
    assert done.receipt.params.tied


def test_the_same_conversion_gives_the_same_bytes_with_any_number_of_threads(
    source: Path, tmp_path: Path
) -> None:
    plan = make_plan(open_checkpoint(source), Target(shards=3))
    for workers in (1, 4):
        convert_checkpoint(plan, tmp_path / str(workers), workers=workers, verified=False)
    for file in (tmp_path / "1").iterdir():
        if file.name != "llamaconv.json":
            assert file.read_bytes() == (tmp_path / "4" / file.name).read_bytes()


THE_TWO_AND_WHAT_TRAINS = ["source", "target", "target-train"]


class TestTarget:
    """The target is complete or not there."""

    def run(self, source: Path, target: Path, **options: Any) -> Conversion:
        return convert_checkpoint(make_plan(open_checkpoint(source)), target, **options)

    def test_existing_target_is_refused_and_unchanged(self, source: Path, tmp_path: Path) -> None:
        target = tmp_path / "target"
        target.mkdir()
        (target / "mine").write_text("precious")
        with pytest.raises(RefusedError, match="exists already"):
            self.run(source, target)
        with pytest.raises(RefusedError, match=r"replaces only checkpoints.*: mine"):
            self.run(source, target, overwrite=True)
        assert (target / "mine").read_text() == "precious"

    def test_target_below_a_file_is_refused(self, source: Path, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(RefusedError, match="a file, not a folder"):
            self.run(source, tmp_path / "file" / "below" / "target")

    @pytest.mark.parametrize("workers", [0, -1, 65])
    def test_invalid_number_of_workers_is_refused(
        self, source: Path, tmp_path: Path, workers: int
    ) -> None:
        with pytest.raises(RefusedError, match=f"workers must be between 1 and 64; got {workers}"):
            self.run(source, tmp_path / "target", workers=workers)
        assert not (tmp_path / "target").exists()

    def test_an_empty_folder_is_filled(self, source: Path, tmp_path: Path) -> None:
        (tmp_path / "target").mkdir()
        self.run(source, tmp_path / "target")
        assert (tmp_path / "target" / ".metadata").is_file()

    def test_overwrite_replaces_it_and_leaves_nothing_stale(
        self, source: Path, tmp_path: Path
    ) -> None:
        plan = make_plan(open_checkpoint(source), Target(shards=5))
        convert_checkpoint(plan, tmp_path / "target")
        self.run(source, tmp_path / "target", overwrite=True)
        assert [f.name for f in sorted((tmp_path / "target").glob("*.distcp"))] == ["__0_0.distcp"]
        assert sorted(path.name for path in tmp_path.iterdir()) == THE_TWO_AND_WHAT_TRAINS

    @pytest.mark.parametrize("place", [".", "inside", ".."])
    def test_target_inside_the_source_or_around_it_is_refused(
        self, source: Path, place: str
    ) -> None:
        before = sorted(source.iterdir())
        with pytest.raises(RefusedError, match="the target must not be inside the source"):
            self.run(source, source / place)
        assert sorted(source.iterdir()) == before

    def test_a_failing_read_leaves_the_old_target(
        self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.run(source, tmp_path / "target")
        before = (tmp_path / "target" / "llamaconv.json").read_bytes()
        read_rows = PieceReader.read_rows

        def failing(self: PieceReader, tensor: Any, *rest: Any) -> None:
            if tensor.name == "model.layers.7.mlp.up_proj.weight":
                raise FailedError("the cable was pulled")
            read_rows(self, tensor, *rest)

        monkeypatch.setattr(PieceReader, "read_rows", failing)
        with pytest.raises(FailedError, match="the cable was pulled"):
            self.run(source, tmp_path / "target", overwrite=True)
        assert (tmp_path / "target" / "llamaconv.json").read_bytes() == before
        assert sorted(path.name for path in tmp_path.iterdir()) == THE_TWO_AND_WHAT_TRAINS

    def test_a_disk_that_is_too_small_is_seen_before_anything_is_written(
        self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import shutil

        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(RefusedError, match="1,000 are free"):
            self.run(source, tmp_path / "target")

    def test_a_full_disk_is_one_clear_error(self, source: Path, tmp_path: Path) -> None:
        # A limit on the size of files fails writes as a full disk does, for real.
        script = (
            "import resource, signal, sys; from llamaconv.cli import main;"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000));"
            f"sys.exit(main(['convert', {str(source)!r}, {str(tmp_path / 'target')!r}, '--quiet']))"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert done.returncode == 1
        assert "File too large; the target was not changed" in done.stderr
        assert "Traceback" not in done.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["source"]

    def test_two_conversions_to_one_target(self, source: Path, tmp_path: Path) -> None:
        import fcntl

        partial = tmp_path / "target.llamaconv-partial"
        partial.mkdir()
        lock = os.open(partial, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RefusedError, match="another conversion is writing"):
            self.run(source, tmp_path / "target")
        os.close(lock)
        (partial / "left by a kill").touch()
        self.run(source, tmp_path / "target")
        assert sorted(path.name for path in tmp_path.iterdir()) == THE_TWO_AND_WHAT_TRAINS

    def test_source_that_changes_during_the_conversion_is_an_error(
        self, source: Path, tmp_path: Path
    ) -> None:
        def meddle(step: str, done: int, total: int) -> None:
            os.utime(source / "model-00001-of-00003.safetensors", (1, 1))

        with pytest.raises(FailedError, match="modified since it was opened"):
            self.run(source, tmp_path / "target", progress=meddle)
        assert not (tmp_path / "target").exists()

    @pytest.mark.parametrize("now", ["modified", "deleted"])
    def test_source_that_changed_since_the_plan_is_refused(
        self, source: Path, tmp_path: Path, now: str
    ) -> None:
        plan = make_plan(open_checkpoint(source), Target())
        shard = source / "model-00002-of-00003.safetensors"
        if now == "deleted":
            shard.unlink()
        else:
            shard.write_bytes(shard.read_bytes())
        with pytest.raises(RefusedError, match=f"model-00002.*{now} since it was opened"):
            convert_checkpoint(plan, tmp_path / "target")
        with pytest.raises(FailedError, match=f"model-00002.*{now} since it was opened"):
            sample_rows(plan, "norm.weight")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]

    def test_step_0_of_a_dump_folder(self, source: Path, tmp_path: Path) -> None:
        done = self.run(source, tmp_path / "dump", as_step_0=True)
        assert done.target == tmp_path / "dump" / "checkpoint" / "step-0"
        assert (done.target / ".metadata").is_file()

    @pytest.mark.parametrize(
        "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.thorough)]
    )
    def test_interrupted_run_leaves_nothing_and_returns_130(
        self, source: Path, tmp_path: Path, number: signal.Signals
    ) -> None:
        slow = (
            "import sys, time; from llamaconv.convert.engine import Engine; from llamaconv.cli import main;"
            "count = Engine.count;"
            "Engine.count = lambda *a: (time.sleep(0.1), count(*a));"
            f"sys.exit(main(['convert', {str(source)!r}, {str(tmp_path / 'target')!r}]))"
        )
        process = subprocess.Popen([sys.executable, "-c", slow], stderr=subprocess.PIPE, text=True)
        partial = tmp_path / "target.llamaconv-partial"
        while not (partial / "__0_0.distcp").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 130
        assert "interrupted" in said
        assert "Traceback" not in said
        assert [path.name for path in tmp_path.iterdir()] == ["source"]
