"""What comes next is ready to run: ``train.sh`` and its module, next to a converted DCP."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.llamas import LLAMA_3_8B, LLAMA_31_8B
from support.train_script import started

from llamaconv import Target, make_plan, open_checkpoint, sample_path
from llamaconv.convert.training_files import folder_for, write_training_files
from llamaconv.model.params import LlamaParams
from llamaconv.torchtitan.advice import Advice, Resumed, advise

MODULE, SCRIPT = "converted_llama.py", "train.sh"


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A folder with a tokenizer, of a name that a shell would take apart."""
    folder = tmp_path / "it's $HOME \n`here`"
    folder.mkdir()
    (folder / "tokenizer.json").touch()
    return folder


def advice(
    at: Path,
    assets: Path | None = None,
    params: LlamaParams = LLAMA_3_8B,
    generation: str = "titan-0.3",
    dump: Path | None = None,
) -> Advice:
    return advise(params, generation, "interleaved", at, dump, assets=assets)


@pytest.mark.parametrize("generation", ["titan-0.3", "titan-0.2"])
@pytest.mark.parametrize("as_step_0", [False, True])
def test_script_starts_the_command_in_its_folder_with_the_tokenizer(
    tmp_path: Path, tokenizer: Path, generation: str, as_step_0: bool
) -> None:
    at = tmp_path / "a dcp\n"
    told = advice(at, tokenizer, generation=generation, dump=at if as_step_0 else None)
    done = write_training_files(told, tmp_path / "there")
    assert done.written == (tmp_path / "there" / SCRIPT, tmp_path / "there" / MODULE)
    folder, words = started(done.written[0], tmp_path / "notes", "--training.steps", "1")
    assert folder == str(tmp_path / "there")
    assert words[:4] == ["--nproc-per-node", "8", "-m", "torchtitan.train"]
    assert words[-2:] == ["--training.steps", "1"]
    # The command of the advice, as bash reads it.
    printed = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {told.command}"], capture_output=True, text=True, check=True
    )
    assert words[:-2] == printed.stdout.split("\0")[1:-1]
    assert str(at) in words and str(tokenizer) in words


def test_without_a_tokenizer_the_script_asks_for_it(tmp_path: Path) -> None:
    done = write_training_files(advice(tmp_path / "dcp"), tmp_path / "there")
    assert str(done).splitlines()[-1] == f"TOKENIZER=DIR bash {tmp_path}/there/{SCRIPT}"
    with pytest.raises(subprocess.CalledProcessError) as error:
        started(done.written[0], tmp_path / "one")
    assert "set TOKENIZER to the folder" in error.value.stderr
    _, words = started(done.written[0], tmp_path / "two", TOKENIZER="/some where", NGPU="2")
    assert words[-2:] == ["--hf_assets_path", "/some where"]
    assert words[:2] == ["--nproc-per-node", "2"]


def test_script_for_0_2_stops_where_the_release_would_train_from_random_weights(
    tmp_path: Path, tokenizer: Path
) -> None:
    told = advice(tmp_path / "dcp", tokenizer, generation="titan-0.2")
    (script, _) = write_training_files(told, tmp_path / "there").written
    saved = tmp_path / "there" / "outputs" / "checkpoint"
    saved.mkdir(parents=True)
    with pytest.raises(subprocess.CalledProcessError) as error:
        started(script, tmp_path / "one")
    assert "random weights" in error.value.stderr
    (saved / "step-500").mkdir()
    (saved / "step-500" / ".metadata").touch()
    assert started(script, tmp_path / "two")


@pytest.mark.parametrize("in_dump", [False, True])
def test_what_a_release_cannot_load_is_left_out_until_the_run_has_a_step_of_its_own(
    tmp_path: Path, tokenizer: Path, in_dump: bool
) -> None:
    dump = tmp_path / "my dump" if in_dump else None
    at = tmp_path / "my dump" / "checkpoint" / "step-2"
    resumed = Resumed("step-2", {"dataloader": "why"})
    told = advise(
        LLAMA_3_8B, "titan-0.3", "interleaved", at, dump, assets=tokenizer, resumed=resumed
    )
    (script, _) = write_training_files(told, tmp_path / "there").written
    left_out = ["--checkpoint.exclude_from_loading", "dataloader"]
    assert " ".join(left_out) in told.command and "first start only" in told.notes[1]
    for name in ("step-1", "step-2", "step-4"):
        _, words = started(script, tmp_path / f"before-{name}")
        assert words[-2:] == left_out
        assert ("--checkpoint.no_initial_load_model_only" in words) != in_dump
        steps = (dump or tmp_path / "there" / "outputs") / "checkpoint"
        if in_dump or name == "step-4":
            (steps / name).mkdir(parents=True)
            (steps / name / ".metadata").touch()
    _, words = started(script, tmp_path / "after")
    assert not set(left_out) & set(words) and "" not in words


def test_unedited_files_are_replaced_and_a_module_without_use_is_removed(tmp_path: Path) -> None:
    there = tmp_path / "there"
    write_training_files(advice(tmp_path / "one"), there)
    done = write_training_files(advice(tmp_path / "two", params=LLAMA_31_8B), there)
    assert done.folder == there
    assert not done.warnings
    assert os.listdir(there) == [SCRIPT]
    assert "/two" in (there / SCRIPT).read_text()


@pytest.mark.parametrize("name", [SCRIPT, MODULE])
def test_edited_file_is_kept_and_another_folder_written(tmp_path: Path, name: str) -> None:
    there = tmp_path / "there"
    write_training_files(advice(tmp_path / "one"), there)
    with (there / name).open("a") as file:
        file.write("# mine\n")
    before = {path.name: path.read_bytes() for path in there.iterdir()}
    done = write_training_files(advice(tmp_path / "two"), there)
    assert done.folder == tmp_path / "there-2"
    assert f"warning: {there} is kept" in str(done)
    assert {path.name: path.read_bytes() for path in there.iterdir()} == before
    assert write_training_files(advice(tmp_path / "three"), there).folder == tmp_path / "there-2"


@pytest.mark.parametrize("kind", ["file", "link", "folder of others"])
def test_what_is_not_ours_is_kept(tmp_path: Path, kind: str) -> None:
    there, elsewhere = tmp_path / "there", tmp_path / "elsewhere"
    elsewhere.mkdir()
    if kind == "file":
        there.touch()
    elif kind == "link":
        there.symlink_to(elsewhere)
    else:
        there.mkdir()
        (there / "notes.txt").touch()
    done = write_training_files(advice(tmp_path / "dcp"), there)
    assert done.folder == tmp_path / "there-2"
    assert not any(elsewhere.iterdir())


def test_files_that_cannot_be_written_are_a_warning_and_the_module_is_printed(
    tmp_path: Path,
) -> None:
    done = write_training_files(advice(tmp_path / "dcp"), tmp_path / "missing" / "there")
    assert done.folder is None
    assert "train.sh was not written" in str(done).splitlines()[1]
    assert "def converted():" in str(done)
    assert done.command in str(done)


@pytest.mark.parametrize(
    ("target", "dump", "folder"),
    [
        ("llama-dcp", None, "llama-dcp-train"),
        ("runs/dump/checkpoint/step-0", "runs/dump", "runs/dump-train"),
        # TorchTitan deletes what has step-N in its name.
        ("dump/checkpoint/step-0", None, "dump/checkpoint/step0-train"),
    ],
)
def test_files_are_next_to_the_target(target: str, dump: str | None, folder: str) -> None:
    assert folder_for(Path(target), dump and Path(dump)) == Path(folder)  # type: ignore[arg-type]


def test_dump_folder_without_a_name_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dump").mkdir()
    monkeypatch.chdir(tmp_path / "dump")
    assert folder_for(Path("checkpoint/step-0"), Path()) == tmp_path / "dump-train"


def test_stock_flavour_needs_no_conversion_from_hugging_face(tmp_path: Path) -> None:
    def told(params: LlamaParams, generation: str) -> Advice:
        return advise(params, generation, "interleaved", tmp_path, huggingface=Path("/hf folder"))

    for generation in ("titan-0.3", "titan-0.2"):
        stock = told(LLAMA_31_8B, generation)
        assert "initial_load_in_hf --checkpoint.initial_load_path '/hf folder'" in str(stock)
        assert stock.to_json()["without_conversion"] in str(stock)
        assert "no conversion is needed" not in str(told(LLAMA_3_8B, generation))
    # 0.1.0 has the flavour, and reads no such folder.
    assert not told(LLAMA_3_8B, "titan-0.2").older[0].without_conversion
    assert not advice(tmp_path, params=LLAMA_31_8B).without_conversion


def test_torchtitan_reads_the_source_only_if_nothing_but_names_and_rows_change(
    tmp_path: Path,
) -> None:
    source = open_checkpoint(sample_path())
    assert make_plan(source).source_trains
    assert not make_plan(source, Target(dtype="float32")).source_trains
    state = load_file(sample_path() / "model-00001-of-00003.safetensors")
    for part in ("2", "3"):
        state |= load_file(sample_path() / f"model-0000{part}-of-00003.safetensors")
    torch.save(state, tmp_path / "pytorch_model.bin")
    shutil.copy(sample_path() / "config.json", tmp_path)
    assert not make_plan(open_checkpoint(tmp_path)).source_trains
