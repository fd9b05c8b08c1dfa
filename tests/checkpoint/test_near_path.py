"""Paths that are one step off: the message names the path to use."""

import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import save

from llamaconv import RefusedError, open_checkpoint
from llamaconv.checkpoint.near_path import _MOST_FOLDERS
from llamaconv.cli import main


def refusal(path: str | Path) -> str:
    with pytest.raises(RefusedError) as refused:
        open_checkpoint(path)
    (problem,) = refused.value.problems
    return problem.message


def test_folder_above_steps_of_any_name_names_the_newest_first(
    tmp_path: Path, source: Path
) -> None:
    """Only names such as step-1000 say that the newest is meant."""
    for step in (500, 1000, 0):
        shutil.copytree(source, tmp_path / "dump" / "saved" / f"llama-{step}")
    assert refusal(tmp_path / "dump") == (
        f"{tmp_path / 'dump'}: it contains 3 checkpoints (saved/llama-1000, saved/llama-500, "
        f"saved/llama-0). Give one of them, such as {tmp_path / 'dump' / 'saved' / 'llama-1000'}; "
        f"to convert each, give {tmp_path / 'dump' / 'saved'} with --every-step"
    )


def test_folder_above_accelerates_model_and_optimizer_names_the_newest_model(
    tmp_path: Path, source: Path
) -> None:
    for step in (500, 1000):
        for name in ("optimizer_0", "pytorch_model_fsdp_0"):
            shutil.copytree(source, tmp_path / "run" / f"checkpoint-{step}" / name)
    newest = tmp_path / "run" / "checkpoint-1000" / "pytorch_model_fsdp_0"
    assert f"contains the checkpoint {newest}. " in refusal(newest.parent)
    assert "2 checkpoints" in refusal(tmp_path / "run")
    assert f"such as {newest}" in refusal(tmp_path / "run")


def test_cache_of_the_hub_names_the_snapshot(tmp_path: Path, source: Path) -> None:
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / "0123abcd"
    snapshot.parent.mkdir(parents=True)
    shutil.move(source, snapshot)
    for folder in (tmp_path / "hub", snapshot.parents[1], snapshot.parent):
        assert refusal(folder) == (
            f"{folder}: it contains the checkpoint {snapshot}. Give that folder"
        )


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_file_of_a_checkpoint_names_its_folder(source: Path, name: str) -> None:
    (source / name).touch()
    assert refusal(source / name) == (
        f"{source / name}: it is a file of the checkpoint {source}. Give the folder"
    )


def test_repository_name_is_answered_with_its_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert refusal("meta-llama/Llama-3.1-8B").endswith("use hf://meta-llama/Llama-3.1-8B")
    assert refusal("a/b/c") == "a/b/c: not found"


@pytest.mark.parametrize(
    ("page", "address"),
    [
        ("https://huggingface.co/org/model", "hf://org/model"),
        ("huggingface.co/org/model/", "hf://org/model"),
        ("https://hf.co/org/model/tree/main", "hf://org/model"),
        ("https://huggingface.co/org/model/blob/v2/config.json", "hf://org/model@v2"),
        ("https://huggingface.co/org/model?library=transformers", "hf://org/model"),
    ],
)
def test_page_of_the_hub_is_answered_with_its_address(page: str, address: str) -> None:
    assert refusal(page).endswith(f"use {address}")


def test_page_of_a_dataset_is_not_taken_for_a_model() -> None:
    assert "hf://" not in refusal("https://huggingface.co/datasets/org")


@pytest.mark.parametrize("step", ["iter_0000200", "weights"])
def test_folder_above_a_dcp_of_megatron_names_megatron(tmp_path: Path, step: str) -> None:
    names = ["decoder.layers.mlp.linear_fc1.weight", "embedding.word_embeddings.weight"]
    stored = {name: torch.zeros(2, 2) for name in names}
    save(stored, checkpoint_id=tmp_path / "run" / step, no_dist=True)
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("200")
    said = refusal(tmp_path / "run")
    assert said.startswith(f"{tmp_path / 'run'}: it contains {tmp_path / 'run' / step}")
    assert "Megatron-Core" in said
    assert "Give" not in said


@pytest.mark.parametrize("address", ["nowhere://bucket/model", "http://host/m"])
def test_other_addresses_are_refused_and_no_folder_is_made(
    tmp_path: Path,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    address: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "are neither read nor written" in refusal(address)
    before = sorted(tmp_path.iterdir())
    for words in (["convert", str(source), address], ["convert", address, "out"]):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: {address}: ")
        assert ("Write to a local folder" in said) == (words[-1] == address)
    assert sorted(tmp_path.iterdir()) == before


def test_large_tree_is_not_searched_to_its_end(tmp_path: Path, source: Path) -> None:
    for number in range(_MOST_FOLDERS):
        (tmp_path / "tree" / f"a{number:04}").mkdir(parents=True)
    shutil.move(source, tmp_path / "tree" / "z")
    assert "not a checkpoint" in refusal(tmp_path / "tree")
