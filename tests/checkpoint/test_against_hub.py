"""A downloaded folder compared with the digests that its repository lists."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from support import checkpoints
from support.hub_server import Hub, listed, serve

from llamaconv import RefusedError
from llamaconv.checkpoint.against_hub import Against, compare_with_repository
from llamaconv.cli.commands import main

MODEL = "hf://org/model"
SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    folder = checkpoints.write(tmp_path_factory.mktemp("hub") / "model")
    (folder / "README.md").write_text("a model")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.00.pth").write_bytes(b"weights in another form")
    with serve(model=folder) as running:
        yield running


@pytest.fixture
def folder(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The repository, downloaded as our own command does: without ``original``."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    target = shutil.copytree(hub.repos["org/model"], tmp_path / "model")
    shutil.rmtree(target / "original")
    (target / ".cache" / "huggingface").mkdir(parents=True)
    (target / ".cache" / "huggingface" / "lock").write_text("")
    return Path(target)


def compared(folder: Path) -> Against:
    return compare_with_repository(folder, MODEL)


def flip_last_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_whole_download_is_equal_and_no_file_is_requested(hub: Hub, folder: Path) -> None:
    before = hub.requests["file"] + hub.requests["cdn"]
    found = compared(folder)
    assert len(found.equal) == 3 + 4, "shards, index, config, tokenizer, README"
    assert (found.different, found.missing, found.extra) == ({}, (), ())
    assert found.left == ("original/consolidated.00.pth",)
    assert not found.problems(folder)
    assert hub.requests["file"] + hub.requests["cdn"] == before


def test_id_of_a_small_file_is_that_of_git(folder: Path) -> None:
    """The loopback Hub and the reader could be wrong alike; git itself cannot."""
    git = shutil.which("git")
    if git is None:
        pytest.skip("no git")
    words = [git, "hash-object", str(folder / "config.json")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.stdout.strip() == listed(folder / "config.json")["blobId"]


def test_every_kind_of_difference_is_an_error_with_its_file(folder: Path) -> None:
    flip_last_bit(folder / SHARD)
    config = folder / "config.json"
    config.write_text(config.read_text().replace("10000.0", "20000.0"))
    cut = folder / "model-00001-of-00003.safetensors"
    cut.write_bytes(cut.read_bytes()[:-3])
    (folder / "tokenizer.json").unlink()
    (folder / "README.md").unlink()
    (folder / "notes.txt").write_text("mine")
    (folder / "model.safetensors").write_bytes(b"")
    found = compared(folder)
    assert set(found.different) == {SHARD, "config.json", cut.name}
    assert "sha256" in found.different[SHARD] and "git blob id" in found.different["config.json"]
    assert "bytes), and hf://org/model@" in found.different[cut.name]
    assert found.missing == ("tokenizer.json",)
    assert found.extra == ("model.safetensors", "notes.txt")
    assert "README.md" in found.left
    errors = [one for one in found.problems(folder) if one.level == "error"]
    named = {name for one in errors for name in one.names}
    assert named == {*found.different, "tokenizer.json", "model.safetensors"}
    (warned,) = [one for one in found.problems(folder) if one.level == "warning"]
    assert "notes.txt" in warned.message


def test_inspect_against_ends_with_2_for_other_bytes(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(folder), "--against", MODEL]) == 0
    assert "7 files have the digests of hf://org/model@" in capsys.readouterr().out
    flip_last_bit(folder / SHARD)
    assert main(["inspect", str(folder), "--against", MODEL, "--json"]) == 2
    shown = capsys.readouterr()
    assert [*json.loads(shown.out)["against"]["different"]] == [SHARD]
    assert f"error: {folder / SHARD}: its sha256 is" in shown.err
    assert main(["inspect", str(folder), "--against", "hf://org/none"]) == 2
    assert "no such repository" in capsys.readouterr().err


def test_what_is_no_repository_or_no_folder_is_refused(folder: Path) -> None:
    with pytest.raises(RefusedError, match="not a repository"):
        compare_with_repository(folder, "org/model")
    with pytest.raises(RefusedError, match="not a folder"):
        compare_with_repository(folder / SHARD, MODEL)
