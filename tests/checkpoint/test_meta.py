"""Meta's original files, read: cut by rows and by columns, in one file and in several."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import einops
import pytest
import torch
from support import checkpoints, torch_memory
from support.folders import assert_same_folder
from torch import Tensor

from llamaconv import (
    RefusedError,
    Target,
    convert_checkpoint,
    make_plan,
    open_checkpoint,
    verify_checkpoint,
)
from llamaconv.convert import torch_stream
from llamaconv.convert.convert import Conversion
from llamaconv.model.names import identify
from llamaconv.model.params import LlamaParams, RopeScaling
from llamaconv.model.params_json import ffn_width, from_params_json, to_params_json

PARAMS: dict[str, Any] = {
    "dim": 64,
    "n_layers": 12,
    "n_heads": 8,
    "n_kv_heads": 2,
    "multiple_of": 96,
    "norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "vocab_size": 80,
}
COLUMNS = ("wo", "w2")


def meta_tensors() -> dict[str, Tensor]:
    """The fixture model under Meta's names, rows interleaved by einops."""
    named = {}
    for name, weight in checkpoints.tensors().items():
        known = identify(name, "huggingface")
        assert known is not None
        if known[0].heads:
            heads = {"n_heads": 8, "n_kv_heads": 2}[known[0].heads]
            weight = einops.rearrange(weight, "(h two f) c -> (h f two) c", h=heads, two=2)
        named[known[0].in_naming("meta", known[1]) or ""] = weight
    return named


def write(folder: Path, n_files: int = 1, embedding: int = 0, **changes: Any) -> Path:
    """``n_files`` model-parallel files; ``embedding`` is the axis that it is cut along."""
    folder.mkdir(parents=True)
    files: list[dict[str, Tensor]] = [{} for _ in range(n_files)]
    for name, weight in meta_tensors().items():
        role = name.split(".")[-2]
        axis = 1 if role in COLUMNS else embedding if role == "tok_embeddings" else 0
        parts = torch.chunk(weight, n_files, dim=axis) if weight.ndim == 2 else [weight] * n_files
        for file, part in zip(files, parts, strict=True):
            file[name] = part.clone()
    for number, file in enumerate(files):
        torch.save(file, folder / f"consolidated.{number:02d}.pth")
    entries = {name: value for name, value in {**PARAMS, **changes}.items() if value is not None}
    (folder / "params.json").write_text(json.dumps(entries))
    return folder


def errors(folder: Path) -> str:
    with pytest.raises(RefusedError) as caught:
        make_plan(open_checkpoint(folder)).raise_for_errors()
    return str(caught.value)


@pytest.mark.parametrize(("n_files", "embedding"), [(1, 0), (2, 0), (2, 1), (4, 1)])
def test_meta_to_hugging_face_equals_the_original_bits(
    source: Path, tmp_path: Path, n_files: int, embedding: int
) -> None:
    folder = write(tmp_path / "meta", n_files, embedding)
    plan = make_plan(open_checkpoint(folder), Target(to="hf", assets=str(source)))
    done = convert_checkpoint(plan, tmp_path / "hf")
    assert done.verification is not None
    assert done.verification.ok
    assert_same_folder(source, done.target)


def test_meta_to_dcp_reorders_no_rows(
    tmp_path: Path, load_dcp: Callable[[Path], dict[str, Tensor]]
) -> None:
    folder = write(tmp_path / "meta" / "original", 2, 1)
    plan = make_plan(open_checkpoint(folder.parent), Target(generation="titan-0.2"))
    assert {move.operation for move in plan.moves} == {"copy"}
    found = load_dcp(convert_checkpoint(plan, tmp_path / "dcp").target)
    expected = meta_tensors()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_embedding_cut_is_recognized_if_vocabulary_equals_width(
    tmp_path: Path,
) -> None:
    weight = torch.randn(64, 64)
    for axis in (0, 1):
        folder = write(tmp_path / str(axis), 2, axis, vocab_size=64)
        for number, part in enumerate(torch.chunk(weight, 2, dim=axis)):
            path = folder / f"consolidated.0{number}.pth"
            state = torch.load(path, weights_only=True)
            state["tok_embeddings.weight"] = part.clone().bfloat16()
            torch.save(state, path)
        tensor = open_checkpoint(folder).tensors["tok_embeddings.weight"]
        assert tensor.shape == (64, 64)
        assert [piece.start[axis] for piece in tensor.pieces] == [0, 32]


@pytest.mark.parametrize("vocabulary", [-1, None])
def test_missing_vocabulary_size_comes_from_the_tensor(
    tmp_path: Path, vocabulary: int | None
) -> None:
    checkpoint = open_checkpoint(write(tmp_path / "meta", vocab_size=vocabulary))
    assert checkpoint.params is not None
    assert checkpoint.params.vocab_size == 80
    assert "using 80 from tok_embeddings" in str(checkpoint.problems[0])


def test_missing_kv_heads_come_from_the_rows_of_k_with_a_warning(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write(tmp_path / "meta", n_kv_heads=None))
    assert checkpoint.params is not None
    assert checkpoint.params.n_kv_heads == PARAMS["n_kv_heads"]
    (said,) = [one.message for one in checkpoint.problems if "n_kv_heads" in one.message]
    assert f"using {PARAMS['n_kv_heads']}" in said
    assert not make_plan(checkpoint, Target(to="meta")).errors


def test_scaled_rope_has_metas_constants_and_a_missing_base_is_a_warning(tmp_path: Path) -> None:
    folder = write(tmp_path / "meta", use_scaled_rope=True, rope_theta=None)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.params is not None
    assert checkpoint.params.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)
    assert checkpoint.params.rope_theta == 10000.0
    assert "rope_theta is missing; using 10000" in str(checkpoint.problems[0])
    (assumed,) = [one for one in checkpoint.problems if "use_scaled_rope" in one.message]
    assert "using 8" in assumed.message
    assert "32" in assumed.message
    assert "--assets" in assumed.message


@pytest.mark.parametrize(
    ("dim", "n_layers", "n_heads", "factor", "n_warnings"),
    [
        (4096, 32, 32, 8.0, 0),
        (2048, 16, 32, 32.0, 1),
        (3072, 28, 24, 32.0, 1),
        (4096, 16, 32, 8.0, 1),
    ],
)
def test_factor_of_the_scaling_is_that_of_the_published_sizes(
    dim: int, n_layers: int, n_heads: int, factor: float, n_warnings: int
) -> None:
    entries = {"dim": dim, "n_layers": n_layers, "n_heads": n_heads, "n_kv_heads": 8}
    entries |= {"norm_eps": 1e-5, "rope_theta": 5e5, "vocab_size": 128, "use_scaled_rope": True}
    shapes = {"w1": (256, dim), "tok_embeddings": (128, dim)}
    params, problems = from_params_json(entries, shapes, "params.json")
    assert params is not None
    assert params.rope_scaling == RopeScaling(factor, 1.0, 4.0, 8192)
    assert len(problems) == n_warnings


def test_receipt_says_the_factor_that_params_json_cannot(
    source: Path, convert: Callable[..., Conversion]
) -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "rope_scaling": scaling}))
    done = convert(source, to="meta")
    assert not open_checkpoint(done.target).problems


def bend_norm(folder: Path, by: float) -> None:
    path = folder / "consolidated.01.pth"
    state = torch.load(path, weights_only=True)
    state["norm.weight"] = (state["norm.weight"].float() + by).bfloat16()
    torch.save(state, path)


def test_small_differences_of_norms_are_a_warning_and_large_an_error(
    tmp_path: Path, convert: Callable[..., Conversion]
) -> None:
    folder = write(tmp_path / "little", 2)
    bend_norm(folder, 0.008)
    assert "1 norms differ between the files" in str(open_checkpoint(folder).problems[0])
    assert convert(folder, verified=True).verification is not None
    folder = write(tmp_path / "much", 2)
    bend_norm(folder, 0.1)
    assert "the files belong to different models" in errors(folder)
    bend_norm(folder, float("nan"))
    assert "by up to inf" in str(open_checkpoint(folder).errors[0])


def test_missing_middle_file_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "meta", 4)
    (folder / "consolidated.02.pth").unlink()
    assert "1 of 4 files are missing: consolidated.02.pth" in errors(folder)


def test_missing_and_cut_files_are_reported_together(tmp_path: Path) -> None:
    folder = write(tmp_path / "meta", 4)
    (folder / "consolidated.01.pth").unlink()
    cut = folder / "consolidated.02.pth"
    cut.write_bytes(cut.read_bytes()[:-500])
    first, second = open_checkpoint(folder).errors
    assert "consolidated.01.pth" in first.message
    assert str(cut) in second.message


def test_missing_last_files_and_files_of_another_model_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "meta", 4)
    for number in (2, 3):
        (folder / f"consolidated.0{number}.pth").unlink()
    said = errors(folder)
    assert "tok_embeddings.weight is [20, 64] in each of 2 files" in said or "last files" in said
    assert "expected shape [64, 64], found [32, 64]" in said
    assert "or the last files are missing" in said
    folder = write(tmp_path / "one", 2)
    state = {n: w[..., : w.shape[-1] // 2] for n, w in meta_tensors().items()}
    torch.save({n: w.clone() for n, w in state.items()}, folder / "consolidated.01.pth")
    assert "the files belong to different models" in errors(folder)


def test_embedding_that_could_be_cut_either_way_is_an_error_with_both_readings(
    tmp_path: Path,
) -> None:
    folder = write(tmp_path / "meta", 2, 1)
    for path in folder.glob("*.pth"):
        state = torch.load(path, weights_only=True)
        torch.save({n: w for n, w in state.items() if "norm" not in n}, path)
    said = errors(folder)
    assert "by rows (Llama 3) it is [160, 32]" in said
    assert "by columns (Llama 1, 2) [80, 64]" in said


def test_web_page_named_params_json_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "meta")
    (folder / "params.json").write_text("<html>please log in</html>")
    assert "params.json: this is an HTML page" in errors(folder)


class Touch:
    """A pickle that would leave a trace if it ran."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return Path.touch, (self.trace,)  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["consolidated.00.pth", "pytorch_model.bin"])
def test_pickle_in_a_meta_file_never_runs(tmp_path: Path, name: str) -> None:
    trace = tmp_path / "trace"
    torch.save({"a": Touch(trace)}, tmp_path / name)
    assert "not only weights" in errors(tmp_path)
    assert not trace.exists()
    torch.load(tmp_path / name, weights_only=False)
    assert trace.exists(), "the payload works, so the refusal was what stopped it"


@pytest.mark.parametrize(
    ("name", "kind"), [("params.json", "/dev/zero"), ("consolidated.00.pth", "pipe")]
)
def test_special_files_are_refused_without_reading(tmp_path: Path, name: str, kind: str) -> None:
    path = write(tmp_path / "meta") / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(kind)
    # With little memory, and in time: this machine is not to be filled where the check fails.
    limited = (
        "import resource, sys; from llamaconv.cli import main\n"
        f"resource.setrlimit(resource.RLIMIT_AS, ({torch_memory.reserved() + (6 << 30)},) * 2)\n"
        "sys.exit(main(['plan', sys.argv[1]]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", limited, path.parent], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and f"{path}: not a file" in done.stderr


def test_truncated_file_is_named_with_its_sizes(tmp_path: Path) -> None:
    folder = write(tmp_path / "meta")
    path = folder / "consolidated.00.pth"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert "consolidated.00.pth: cut or damaged" in errors(folder)


class TestBin:
    """``pytorch_model*.bin``, with and without an index."""

    def write(self, folder: Path, shards: int, index: bool) -> Path:
        checkpoints.write(folder, shards=1)
        (folder / "model.safetensors").unlink()
        weights = checkpoints.tensors()
        if shards == 1:
            torch.save(weights, folder / "pytorch_model.bin")
            return folder
        weight_map = {}
        for number in range(shards):
            file = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
            part = {name: weights[name] for name in list(weights)[number::shards]}
            torch.save(part, folder / file)
            weight_map.update(dict.fromkeys(part, file))
        if index:
            path = folder / "pytorch_model.bin.index.json"
            path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return folder

    @pytest.mark.parametrize(("shards", "index"), [(1, False), (3, True), (3, False)])
    def test_there_and_back(
        self,
        source: Path,
        tmp_path: Path,
        convert: Callable[..., Conversion],
        shards: int,
        index: bool,
    ) -> None:
        folder = self.write(tmp_path / "bin", shards, index)
        done = convert(folder, name="dcp", dtype="keep")
        assert done.verification is not None
        assert done.verification.ok
        assert_same_folder(source, convert(done.target, name="hf").target)

    def test_safetensors_next_to_torch_files_are_preferred_and_the_others_listed(
        self, source: Path, tmp_path: Path
    ) -> None:
        self.write(tmp_path / "bin", 1, False)
        (source / "pytorch_model.bin").write_bytes(b"whatever")
        checkpoint = open_checkpoint(source)
        assert not checkpoint.problems
        assert [ignored.name for ignored in checkpoint.ignored] == ["pytorch_model.bin"]

    def test_the_old_format_of_torch_is_named(self, tmp_path: Path) -> None:
        folder = self.write(tmp_path / "bin", 1, False)
        weights = checkpoints.tensors()
        path = folder / "pytorch_model.bin"
        torch.save(weights, path, _use_new_zipfile_serialization=False)
        assert "load it with torch and save it again" in errors(folder)


class TestWritten:
    def test_torch_is_not_asked_to_prepare_for_a_gpu(
        self, source: Path, convert: Callable[..., Conversion], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def guard() -> None:
            raise AssertionError("where there is no GPU, torch 2.10 with CUDA crashes after this")

        monkeypatch.setattr(torch._C, "_ensureCUDADeviceGuardSet", guard)
        done = convert(source, to="meta", shards=2)
        assert done.verification and done.verification.ok

    """Files that we write, read back by torch alone."""

    @pytest.mark.parametrize("n_files", [1, 2])
    def test_they_are_the_parts_that_metas_layers_expect(
        self, source: Path, convert: Callable[..., Conversion], n_files: int
    ) -> None:
        done = convert(source, to="meta", shards=n_files)
        assert done.verification is not None
        assert done.verification.ok
        files = [
            torch.load(done.target / f"consolidated.{number:02d}.pth", weights_only=True)
            for number in range(n_files)
        ]
        expected = meta_tensors()
        for name, weight in expected.items():
            axis = 1 if name.split(".")[-2] in COLUMNS else 0
            parts = torch.chunk(weight, n_files, axis) if weight.ndim == 2 else [weight] * n_files
            for file, part in zip(files, parts, strict=True):
                assert file.keys() == expected.keys()
                assert torch.equal(file[name], part), name

    @pytest.mark.parametrize("n_files", [1, 2])
    def test_there_and_back_equal_to_the_bit(
        self, source: Path, convert: Callable[..., Conversion], n_files: int
    ) -> None:
        meta = convert(source, name="meta", to="meta", shards=n_files).target
        dcp = convert(meta, name="dcp", generation="titan-0.2", shards=3).target
        again = convert(dcp, name="again", to="meta").target
        assert_same_folder(source, convert(again, name="hf", to="hf").target)

    def test_tied_heads_are_written_twice_and_come_back_once(
        self, tmp_path: Path, convert: Callable[..., Conversion]
    ) -> None:
        weights = checkpoints.tensors()
        del weights["lm_head.weight"]
        source = checkpoints.write(tmp_path / "hf", weights, tie_word_embeddings=True)
        meta = convert(source, name="meta", to="meta").target
        state = torch.load(meta / "consolidated.00.pth", weights_only=True)
        assert torch.equal(state["output.weight"], state["tok_embeddings.weight"])
        (meta / "llamaconv.json").unlink()
        back = convert(meta, name="back", to="hf", assets=str(source)).target
        assert_same_folder(source, back)

    def test_what_metas_format_cannot_express_is_refused(
        self, tmp_path: Path, source: Path
    ) -> None:
        scaling = {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        folder = checkpoints.write(tmp_path / "scaled", rope_scaling=scaling)
        for where, options, words in (
            (folder, {}, "cannot state the RoPE scaling"),
            (source, {"shards": 4}, "n_kv_heads 2 cannot be cut"),
        ):
            plan = make_plan(open_checkpoint(where), Target(to="meta", **options))  # type: ignore[arg-type]
            with pytest.raises(RefusedError, match=words):
                plan.raise_for_errors()


@pytest.mark.parametrize(
    ("dim", "ffn_dim"),
    [(4096, 11008), (8192, 28672), (16384, 53248), (2048, 8192), (4096, 14336), (64, 96), (48, 11)],
)
def test_params_json_gives_the_same_width_by_metas_formula(dim: int, ffn_dim: int) -> None:
    params = replace(checkpoints.GQA, dim=dim, head_dim=dim // 8, ffn_dim=ffn_dim)
    entries = to_params_json(params)
    assert ffn_width(dim, entries["multiple_of"], entries.get("ffn_dim_multiplier")) == ffn_dim


@pytest.mark.parametrize("to", ["meta", "dcp"])
def test_files_are_read_alike_if_they_cannot_be_mapped(
    to: str, tmp_path: Path, convert: Callable[..., Conversion], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ways to have tensors without data, and one content."""
    source = checkpoints.write(tmp_path / "source")
    plain = convert(source, "plain", to=to)
    entered = []

    class Limited(torch_stream._WithoutData):
        def __enter__(self) -> Any:
            entered.append(self)
            return super().__enter__()

    def refuse(n_bytes: int) -> None:
        raise OSError("cannot allocate memory")

    monkeypatch.setattr(torch_stream, "_WithoutData", Limited)
    monkeypatch.setattr(torch_stream, "scratch", refuse)
    limited = convert(source, "limited", to=to)
    assert len(entered) == (1 if to == "meta" else len(plain.plan.written))
    # The checks read both with torch's own loaders, and compare every element.
    assert plain.verification and plain.verification.ok
    assert limited.verification and limited.verification.ok
    assert plain.receipt.tensors == limited.receipt.tensors
    if to == "meta":
        one, other = (
            torch.load(done.target / "consolidated.00.pth", weights_only=True)
            for done in (plain, limited)
        )
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.thorough
def test_rope_scaling_by_32_passes_the_checks(
    tmp_path: Path, convert: Callable[..., Conversion]
) -> None:
    """Llama 3.2's, whose factor params.json does not name: its reader says so each time."""
    scaling = RopeScaling(32.0, 1.0, 4.0, 8192)
    params = LlamaParams(2048, 16, 32, 8, 64, 64, 64, 1e-5, 5e5, scaling)
    source = checkpoints.write_model(tmp_path / "source", params)
    done = convert(source, to="meta")
    assert done.verification and done.verification.ok
    assert verify_checkpoint(done.target).ok
