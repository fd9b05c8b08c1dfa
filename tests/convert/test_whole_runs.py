"""A run moves between TorchTitan's generations with its optimizer: every entry as torch has it there."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from support import checkpoints, runs

from llamaconv import (
    RefusedError,
    Target,
    convert_checkpoint,
    make_plan,
    open_checkpoint,
    verify_checkpoint,
)
from llamaconv.checkpoint.tensors import TensorInfo
from llamaconv.checkpoint.trainer_state import read_trainer_state
from llamaconv.cli.commands import main
from llamaconv.convert.convert import Conversion

W13 = "optimizer.state.layers.1.feed_forward.w13.weight.exp_avg"
WQKV = "optimizer.state.layers.1.attention.qkv_linear.wqkv.weight.exp_avg_sq"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in every form, each saved by torch, and a folder with its config.json."""
    home = tmp_path_factory.mktemp("runs")
    for form in runs.FORMS:
        runs.write(home / form / "step-2", runs.state(form))
    checkpoints.write(
        home / "assets", checkpoints.tensors(runs.PARAMS), num_hidden_layers=runs.PARAMS.n_layers
    )
    return home


def move(source: Path, target: Path, home: Path, **options: Any) -> Conversion:
    options = {"with_optimizer": True, "assets": str(home / "assets"), **options}
    return convert_checkpoint(make_plan(open_checkpoint(source), Target(**options)), target)


GENERATIONS = ("titan-0.2", "titan-0.3", "titan-main")
# Each fuses or splits other parameters; the further directions are combinations of the same steps.
DIRECTIONS = {
    ("titan-0.2", "titan-0.3"),
    ("titan-0.2", "titan-main"),
    ("titan-0.3", "titan-main"),
    ("titan-0.3", "titan-0.2"),
    ("titan-0.3 split", "titan-0.3"),
    ("titan-main", "titan-0.3"),
}


@pytest.mark.parametrize(
    ("form", "generation"),
    [
        pytest.param(*one, marks=() if one in DIRECTIONS else pytest.mark.thorough)
        for one in product(runs.FORMS, GENERATIONS)
    ],
)
def test_every_entry_is_what_the_other_release_would_have_saved(
    home: Path, tmp_path: Path, form: str, generation: str
) -> None:
    # 3 chunks of wqkv begin within heads.
    done = move(home / form / "step-2", tmp_path / "new", home, generation=generation, shards=3)
    assert done.verification is not None and done.verification.ok
    assert_moved(done.target, home / generation / "step-2")


def assert_moved(target: Path, reference: Path) -> dict[str, Any]:
    """The target has the reference's entries, and of 0.2's scheduler perhaps more."""
    found, expected = runs.entries(target), runs.entries(reference)
    more = found.keys() - expected.keys()
    assert all(name.startswith("lr_scheduler.") for name in more)
    found = {name: one for name, one in found.items() if name not in more}
    runs.assert_same(found, expected)
    return found


def test_moments_keep_their_dtype_and_amsgrad_its_maximum(home: Path, tmp_path: Path) -> None:
    saved, expected = (runs.state(form, amsgrad=True) for form in ("titan-0.2", "titan-main"))
    for state in (saved, expected):
        moments = state["optimizer"]
        for name in [name for name in moments if "exp_avg" in name]:
            moments[name] = moments[name].bfloat16()
        model = [name for name in state if name.endswith("weight")]
        state |= {name: state[name].half() for name in model} if state is expected else {}
    source, reference = (
        runs.write(tmp_path / name, state) for name, state in (("a", saved), ("b", expected))
    )
    done = move(source, tmp_path / "new", home, generation="titan-main", dtype="float16")
    found = assert_moved(done.target, reference)
    assert sum("max_exp_avg_sq" in name for name in found) == 15


def test_rows_of_moments_are_reordered_as_their_weights(home: Path, tmp_path: Path) -> None:
    """Moments of q equal to its weights must stay so, in the other layout too."""
    state = runs.state("titan-0.3 split")
    for name in [name for name in state if name.endswith("weight")]:
        state["optimizer"][f"state.{name}.exp_avg"] = state[name].clone()
    source = runs.write(tmp_path / "a", state)
    done = move(source, tmp_path / "b", home, generation="titan-0.2", rope="half_split")
    found = runs.entries(done.target)
    weights = [name for name in found if name.endswith("weight")]
    assert len(weights) == 21
    assert all(
        torch.equal(found[name], found[f"optimizer.state.{name}.exp_avg"]) for name in weights
    )
    q = "layers.0.attention.wq.weight"
    assert not torch.equal(found[q], state["layers.0.attention.qkv_linear.wq.weight"])


@pytest.mark.parametrize("n_layers", [2, pytest.param(12, marks=pytest.mark.thorough)])
def test_a_tied_head_has_no_moments_of_its_own(tmp_path: Path, n_layers: int) -> None:
    params = replace(checkpoints.GQA, tied=True, n_layers=n_layers)
    weights = checkpoints.tensors(params)
    entries = {"tie_word_embeddings": True, "num_hidden_layers": n_layers}
    checkpoints.write(tmp_path / "assets", weights, **entries)
    source, expected = (
        runs.write(tmp_path / form, runs.state(form, params, tied=True))
        for form in ("titan-0.3", "titan-main")
    )
    done = move(source, tmp_path / "new", tmp_path, generation="titan-main")
    runs.assert_same(runs.entries(done.target), runs.entries(expected))
    with pytest.raises(RefusedError, match=r"needs the state of output\.weight too"):
        move(source, tmp_path / "old", tmp_path, generation="titan-0.2")
    with pytest.raises(RefusedError, match=r"no state of 1 tensors of the model: lm_head"):
        move(source, tmp_path / "apart", tmp_path, tie="untie", shards=2)


def test_chunks_through_heads_and_halves_are_a_source_too(home: Path, tmp_path: Path) -> None:
    first = home / "titan-0.2" / "step-2"
    main = move(first, tmp_path / "main", home, generation="titan-main", shards=5).target
    assert max(len(one.pieces) for one in read_trainer_state(main).tensors.values()) == 5
    for generation in ("titan-0.2", "titan-0.3"):
        done = move(main, tmp_path / generation, home, generation=generation, shards=2)
        assert_moved(done.target, home / generation / "step-2")


@pytest.mark.thorough
@pytest.mark.parametrize("form", ["titan-0.3", "titan-0.3 split", "titan-main"])
def test_norms_within_the_heads_of_qwen_3_have_moments_too(tmp_path: Path, form: str) -> None:
    params = replace(runs.PARAMS, family="qwen3", head_dim=16)
    checkpoints.write_model(tmp_path / "assets", params)
    source = runs.write(tmp_path / "source", runs.state(form, params))
    for generation in ("titan-0.3", "titan-main"):
        reference = runs.write(tmp_path / generation, runs.state(generation, params))
        done = move(
            source, tmp_path / "new" / generation, tmp_path, generation=generation, shards=3
        )
        found = assert_moved(done.target, reference)
        assert "optimizer.state.layers.1.attention.q_norm.weight.exp_avg" in found


@pytest.mark.thorough
def test_a_run_of_four_ranks_moves_whole(tmp_path: Path) -> None:
    params = replace(
        checkpoints.GQA, n_heads=9, n_kv_heads=3, head_dim=6, ffn_dim=90, vocab_size=81
    )
    checkpoints.write_model(tmp_path / "assets", params)
    states = {form: runs.state(form, params) for form in runs.FORMS}
    torch.save(states, tmp_path / "states.pt")
    script = Path(runs.__file__).with_name("ranks_run.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4"]
    command += ["--standalone", str(script), str(tmp_path / "states.pt"), str(tmp_path / "saved")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    loaders = {f"dp_rank_{rank}": f"of {rank}".encode() for rank in range(4)} | {"world_size": 4}
    for form, generation in product(runs.FORMS, GENERATIONS):
        reference = tmp_path / "expected" / generation
        if not reference.exists():
            runs.write(reference, states[generation] | {"dataloader": loaders})
        new = tmp_path / "new" / f"{form} to {generation}"
        source = tmp_path / "saved" / form
        assert_moved(move(source, new, tmp_path, generation=generation, shards=3).target, reference)


@pytest.mark.thorough
def test_three_ranks_write_the_files_of_one(home: Path, tmp_path: Path) -> None:
    source = home / "titan-0.2" / "step-2"
    alone = move(source, tmp_path / "alone", home, generation="titan-main", shards=3).target
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "3"]
    command += ["--standalone", "-m", "llamaconv", "convert", str(source), str(tmp_path / "three")]
    command += ["--with-optimizer", "--generation", "titan-main", "--shards", "3", "--quiet"]
    command += ["--assets", str(home / "assets")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    files = [one.name for one in alone.iterdir() if one.name != "llamaconv.json"]
    assert len(files) > 3
    for name in files:
        assert (tmp_path / "three" / name).read_bytes() == (alone / name).read_bytes(), name
    assert verify_checkpoint(tmp_path / "three").ok


def test_every_step_of_a_run_moves(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, new = tmp_path / "run" / "checkpoint", tmp_path / "new" / "checkpoint"
    for step in (2, 10):
        shutil.copytree(home / "titan-0.3" / "step-2", run / f"step-{step}")
    words = [str(run), str(new), "--every-step", "--with-optimizer", "--generation", "titan-main"]
    assert main(["convert", *words, "--assets", str(home / "assets"), "--quiet"]) == 0
    for step in (2, 10):
        assert_moved(new / f"step-{step}", home / "titan-main" / "step-2")
    assert main(["convert", *words, "--assets", str(home / "assets")]) == 0
    assert capsys.readouterr().out.count("converted before; skipped") == 2


def test_without_the_option_the_state_is_read_past_and_said(home: Path, tmp_path: Path) -> None:
    options = {"to": "dcp", "generation": "titan-main", "with_optimizer": False}
    done = move(home / "titan-0.3" / "step-2", tmp_path / "new", home, **options)
    assert not read_trainer_state(done.target).tensors and not done.plan.trainer_state
    assert any("optimizer: state of the trainer" in str(one) for one in done.plan.source.ignored)
    kept = move(home / "titan-0.3" / "step-2", tmp_path / "kept", home, generation="titan-main")
    assert not kept.plan.source.ignored


def test_the_command_says_what_it_carries_and_how_to_go_on(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(home / "titan-0.2" / "step-2"), "--with-optimizer", "--json"]
    words += ["--assets", str(home / "assets")]
    assert main(["plan", *words]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["target"]["to"] == "dcp"
    groups = "optimizer.param_groups.norm.weight."
    saved = runs.entries(home / "titan-0.2" / "step-2")
    n_keys = sum(name.startswith(groups) for name in saved)
    assert planned["trainer_state"] == {
        "optimizer.state.exp_avg": 17,  # 21 tensors of the model, q, k and v of 2 layers as one
        "optimizer.state.exp_avg_sq": 17,
        "optimizer.state.step": 17,
        "optimizer.param_groups": 17 * n_keys,
        "lr_scheduler": sum(name.startswith("lr_scheduler.") for name in saved),
        "train_state": 2,
        "dataloader": 2,
    }
    assert len(planned["moves"]) == 21
    target = tmp_path / "dump" / "checkpoint" / "step-2"
    assert main(["convert", *words[:1], str(target), *words[1:]]) == 0
    done = json.loads(capsys.readouterr().out)
    assert f"--dump_folder {tmp_path / 'dump'}" in done["next"]
    assert "initial_load" not in done["next"] and "initial_load" not in done["script"]
    assert "goes on from its step" in done["notes"][0]
    away, older = tmp_path / "away", ["--generation", "titan-0.2", "--shards", "2"]
    assert main(["convert", *words[:1], str(away), *words[1:], *older]) == 0
    done = json.loads(capsys.readouterr().out)
    assert f"--checkpoint.initial_load_path {away} --checkpoint.no_initial_load_model_only" in str(
        done["next"]
    )
    assert done["older"] == []  # 0.1.0 has other names


def test_step_0_would_be_loaded_as_a_model_alone(home: Path, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="nothing but the model from a step-0"):
        move(home / "titan-0.2" / "step-2", tmp_path / "step-0", home)


def _overwrite(piece_of: TensorInfo | Path, offset: int, data: bytes) -> None:
    file = piece_of if isinstance(piece_of, Path) else piece_of.pieces[0].local_file
    with file.open("r+b") as opened:
        opened.seek(offset)
        opened.write(data)


def test_a_changed_moment_and_a_changed_value_fail_the_checks(home: Path, tmp_path: Path) -> None:
    source = home / "titan-0.2" / "step-2"
    done = move(source, tmp_path / "new", home, generation="titan-main")
    assert verify_checkpoint(done.target, source=source).ok and verify_checkpoint(done.target).ok
    state = read_trainer_state(done.target)
    moment = state.tensors[W13]
    before = moment.pieces[0].local_file.read_bytes()
    at = moment.pieces[0].offset + 4 * 96 * 64  # the first element of w3's, after w1's 96 rows
    _overwrite(moment, at, b"\x12\x34")
    (failed,) = (one for one in verify_checkpoint(done.target, source=source).checks if not one.ok)
    assert failed.name == "bits" and f"{W13}[w3]" in failed.detail
    against_receipt = verify_checkpoint(done.target).checks[-1]
    assert not against_receipt.ok and W13 in against_receipt.detail
    moment.pieces[0].local_file.write_bytes(before)

    value = state.values["lr_scheduler.last_epoch"]
    _overwrite(value.file, value.offset + value.length // 2, b"\xff")
    (failed,) = (one for one in verify_checkpoint(done.target, source=source).checks if not one.ok)
    assert failed.name == "trainer's values" and "lr_scheduler.last_epoch" in failed.detail
    against_receipt = verify_checkpoint(done.target).checks[-1]
    assert not against_receipt.ok and "lr_scheduler.last_epoch" in against_receipt.detail


def test_the_checks_of_large_moments_take_them_apart_themselves(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llamaconv.verify.independent_readers.WHOLE_BYTES", 200)
    source = home / "titan-main" / "step-2"
    done = move(source, tmp_path / "new", home, generation="titan-0.3", shards=2)
    assert done.verification is not None and done.verification.ok
    moment = read_trainer_state(done.target).tensors[WQKV]
    # A row of the first value head: 4 query heads and a key head of 8 rows come before it.
    _overwrite(moment, moment.pieces[0].offset + 40 * 64 * 4, b"\x12\x34")
    failed = next(one for one in verify_checkpoint(done.target, source=source).checks if not one.ok)
    assert f"in 1 tensors: {WQKV}[wv]" in failed.detail
