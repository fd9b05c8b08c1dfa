"""Opening Hugging Face folders: index against headers, files that are not what they say."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support import checkpoints

from llamaconv import RefusedError, open_checkpoint
from llamaconv.checkpoint.reader import PieceReader

INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00003.safetensors"


def problems_of(folder: Path) -> list[str]:
    return [str(problem) for problem in open_checkpoint(folder).problems]


def only_problem(folder: Path) -> str:
    problems = problems_of(folder)
    assert len(problems) == 1, problems
    return problems[0]


def test_every_byte_is_where_safetensors_finds_it(source: Path) -> None:
    checkpoint = open_checkpoint(source)
    assert not checkpoint.problems
    assert checkpoint.params == checkpoints.GQA
    with PieceReader() as reader:
        for name, tensor in checkpoint.tensors.items():
            with safe_open(tensor.pieces[0].file, framework="pt") as file:
                expected = file.get_tensor(name)
            buffer = bytearray(tensor.nbytes)
            reader.read_rows(tensor, 0, tensor.n_rows, memoryview(buffer))
            assert bytes(buffer) == expected.view(torch.uint8).numpy().tobytes()
            assert tensor.shape == tuple(expected.shape)
            assert f"torch.{tensor.dtype}" == str(expected.dtype)


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}, {"anything": "else"}])
def test_metadata_of_the_header_may_be_absent_empty_or_other(
    tmp_path: Path, metadata: dict[str, str] | None
) -> None:
    folder = checkpoints.write(tmp_path / "hf", shards=1)
    save_file(checkpoints.tensors(), folder / "model.safetensors", metadata=metadata)
    assert not problems_of(folder)


def test_one_file_no_index_one_of_one_and_several_without_an_index(tmp_path: Path) -> None:
    single = checkpoints.write(tmp_path / "single", shards=1)
    one_of_one = checkpoints.write(tmp_path / "one", shards=1)
    (one_of_one / "model.safetensors").unlink()
    checkpoints.write_shards(one_of_one, checkpoints.tensors(), 1)
    no_index = checkpoints.write(tmp_path / "none")
    (no_index / INDEX).unlink()
    names = set(checkpoints.tensors())
    for folder in (single, one_of_one, no_index, single / "model.safetensors"):
        checkpoint = open_checkpoint(folder)
        assert not checkpoint.problems
        assert set(checkpoint.tensors) == names


def test_missing_shard_is_one_problem_with_its_tensors(source: Path) -> None:
    (source / SHARD).unlink()
    problem = only_problem(source)
    assert f"{source / SHARD}: not found; it should hold 37 tensors" in problem
    assert "download is incomplete" in problem


def test_a_missing_shard_of_a_numbered_series_without_an_index(source: Path) -> None:
    (source / INDEX).unlink()
    (source / SHARD).unlink()
    assert "shards 2 of 3 of model are missing" in only_problem(source)


def test_a_dangling_link_into_a_cache_is_named_and_a_good_one_followed(source: Path) -> None:
    blob = source / "blob"
    (source / SHARD).rename(blob)
    (source / SHARD).symlink_to("blob")
    assert not problems_of(source)
    blob.unlink()
    assert "a link to blob, which does not exist" in only_problem(source)


@pytest.mark.parametrize("file", ["../x", "/etc/x", "a/b", "..", "", "a\\b", "a\0b"])
def test_shard_names_that_leave_the_folder_are_refused(source: Path, file: str) -> None:
    checkpoints.edit_json(
        source / INDEX, lambda index: index["weight_map"].update({"lm_head.weight": file})
    )
    assert any("not a bare file name" in problem for problem in problems_of(source))


def test_index_entry_in_another_or_no_shard_is_named(source: Path) -> None:
    def edit(index: dict) -> None:  # type: ignore[type-arg]
        files = sorted(set(index["weight_map"].values()))
        index["weight_map"]["lm_head.weight"] = next(
            file for file in files if file != index["weight_map"]["lm_head.weight"]
        )
        index["weight_map"]["model.nothing.weight"] = files[0]

    checkpoints.edit_json(source / INDEX, edit)
    problem = next(p for p in problems_of(source) if "2 tensors are not in the file" in p)
    assert "lm_head.weight (in model-0000" in problem
    assert "model.nothing.weight" in problem


def test_a_wrong_total_size_is_a_warning(source: Path) -> None:
    checkpoints.edit_json(source / INDEX, lambda index: index["metadata"].update(total_size=7))
    assert only_problem(source).startswith("warning:")
    assert "total_size is 7 bytes" in only_problem(source)


def test_the_index_decides_and_other_files_are_listed_as_ignored(source: Path) -> None:
    save_file({"lm_head.weight": torch.zeros(80, 64)}, source / "consolidated.safetensors")
    checkpoint = open_checkpoint(source)
    assert not checkpoint.problems
    assert [ignored.name for ignored in checkpoint.ignored] == ["consolidated.safetensors"]
    assert checkpoint.tensors["lm_head.weight"].dtype == "bfloat16"


def test_a_name_twice_without_an_index_is_an_error(tmp_path: Path) -> None:
    folder = checkpoints.write(tmp_path / "hf", shards=1)
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    save_file({"lm_head.weight": torch.zeros(80, 64)}, folder / "other.safetensors")
    problem = only_problem(folder)
    assert "part.safetensors" in problem
    assert "other.safetensors" in problem
    assert "lm_head.weight" in problem


def cut(path: Path, n_bytes: int) -> None:
    os.truncate(path, path.stat().st_size - n_bytes)


def extend(path: Path, n_bytes: int) -> None:
    with open(path, "ab") as file:
        file.write(bytes(n_bytes))


def header(text: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(len(text).to_bytes(8, "little") + text)


def entry(dtype: str = "F32", shape: str = "[2]", offsets: str = "[0,8]") -> bytes:
    return f'{{"a":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}'.encode()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: cut(path, 100), "100 bytes are missing"),
        (lambda path: extend(path, 16), "16 bytes too many"),
        (lambda path: path.write_bytes(b""), "the file is empty"),
        (lambda path: path.write_bytes(b"\x10"), "cut inside its header"),
        (lambda path: path.write_bytes((500).to_bytes(8, "little") + b"{}"), "at least 508"),
        (
            lambda path: path.write_bytes(
                b"version https://git-lfs.github.com/spec/v1\noid sha256:0"
            ),
            "this is a Git-LFS pointer",
        ),
        (lambda path: path.write_bytes(b"<!DOCTYPE html><html>" * 9), "this is an HTML page"),
        (lambda path: path.write_bytes(b"\xff" * 64), "not a safetensors file"),
        (header(b"not json"), "not valid JSON"),
        (header(b"[" * 100_000), "not valid JSON"),
        (header(b"[1]"), "not a JSON object"),
        (header(b'{"a":1,"a":2}'), "'a' appears twice"),
        (header(entry(dtype="F4")), "unknown dtype 'F4'"),
        (header(entry(shape="[-2]")), "whole numbers"),
        (header(entry(shape="[2.0]")), "whole numbers"),
        (header(entry(offsets="[0]")), "whole numbers"),
        (header(entry(shape="[3]")), "8 bytes for shape [3] of float32 instead of 12"),
        (header(entry(shape="[4294967296,4294967296]")), "bytes for shape"),
        (header(entry(offsets="[8,16]")), "leaves a gap"),
        (header(entry()), "8 bytes are missing"),
        (header(b'{"a":3}'), "not an object"),
    ],
)
def test_damaged_shard_of_a_repository_is_a_problem(
    source: Path, damage: Callable[[Path], object], words: str
) -> None:
    damage(source / SHARD)
    problems = problems_of(source)
    assert any(words in problem and SHARD in problem for problem in problems), problems


def test_a_pipe_and_a_folder_called_like_a_shard_are_not_waited_for(tmp_path: Path) -> None:
    folder = checkpoints.write(tmp_path / "hf", shards=1)
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "one.safetensors")
    (folder / "two.safetensors").mkdir()
    assert "2 files (one.safetensors, two.safetensors): not a file" in only_problem(folder)


def test_overlapping_tensors(source: Path) -> None:
    two = b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}'
    (source / SHARD).write_bytes(len(two).to_bytes(8, "little") + two + bytes(6))
    assert any("tensor b overlaps" in problem for problem in problems_of(source))


@pytest.mark.parametrize(
    "content", ["", "[]", "{", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}']
)
def test_invalid_index_is_an_error(source: Path, content: str) -> None:
    (source / INDEX).write_text(content)
    assert any(INDEX in problem and "error" in problem for problem in problems_of(source))


def test_no_config_and_a_config_that_is_a_web_page(source: Path) -> None:
    (source / "config.json").write_text("<html>login</html>")
    assert "config.json: this is an HTML page" in only_problem(source)
    (source / "config.json").unlink()
    assert "config.json: not found" in only_problem(source)


def test_adapters_are_recognised(source: Path) -> None:
    for file in source.glob("model*"):
        file.unlink()
    part = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(4, 64)}
    save_file(part, source / "adapter_model.safetensors")
    for path in (source, source / "adapter_model.safetensors"):
        with pytest.raises(RefusedError, match="Merge the adapter first") as caught:
            open_checkpoint(path)
        assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.distcp", "no .metadata"),
        ("adapter_model.bin", "Merge the adapter first"),
        ("notes.txt", "found notes.txt"),
    ],
)
def test_folders_that_hold_something_else_are_named(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(RefusedError, match=words):
        open_checkpoint(tmp_path)


def test_missing_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="not found"):
        open_checkpoint(tmp_path / "nowhere")


def test_parts_of_one_tensor_that_differ_in_kind_are_an_error(tmp_path: Path) -> None:
    source = checkpoints.write(tmp_path / "hf")
    (source / INDEX).unlink()
    for number, weight in enumerate((torch.ones(2, 2), torch.ones(2)), 1):
        noted = {"odd": {"saved_offsets": [0] * weight.ndim}}
        metadata = {"DCP_SHARDING_INFO": json.dumps(noted)}
        save_file({"odd": weight}, source / f"part{number}.safetensors", metadata=metadata)
    assert any(
        "odd is cut over 2 files, and they differ" in problem for problem in problems_of(source)
    )


def test_index_may_list_tensors_that_no_llama_needs(tmp_path: Path) -> None:
    """RoPE's angles, and a tied head: neither is in any file (TGI #790)."""
    weights = checkpoints.tensors()
    del weights["lm_head.weight"]
    folder = checkpoints.write(tmp_path / "source", weights, tie_word_embeddings=True)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    needless = ["model.layers.0.self_attn.rotary_emb.inv_freq", "lm_head.weight"]
    index["weight_map"].update(dict.fromkeys(needless, "model-00001-of-00003.safetensors"))
    path.write_text(json.dumps(index))
    checkpoint = open_checkpoint(folder)
    assert not checkpoint.errors
    assert any("2 tensors that no file has" in str(one) for one in checkpoint.ignored)
    (folder / "config.json").write_text(
        (folder / "config.json").read_text().replace('"tie_word_embeddings": true', '"x": 0')
    )
    assert "lm_head.weight" in str(open_checkpoint(folder).errors[0])


@pytest.mark.parametrize("indexed", [True, False])
def test_adapter_next_to_weights_is_left_out_and_reported(tmp_path: Path, indexed: bool) -> None:
    """torchtune's LoRA recipes write both into the folder of an epoch (torchtune #2074)."""
    folder = checkpoints.write(tmp_path / "source")
    if not indexed:
        (folder / "model.safetensors.index.json").unlink()
    part = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(4, 64)}
    save_file(part, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    checkpoint = open_checkpoint(folder)
    assert not checkpoint.errors
    (said,) = checkpoint.problems
    assert "adapter_config.json, adapter_model.safetensors" in said.message
