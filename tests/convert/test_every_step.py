"""A run of several steps, converted one after the other by one command."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from support import checkpoints
from support.folders import of_main

from llamaconv.cli import main
from llamaconv.model.names import every_role

PARAMS = replace(checkpoints.GQA, n_layers=1)


def save(folder: Path, naming: str, value: float) -> None:
    """A model all of whose values are ``value``, as a trainer saves it."""
    named = {
        str(role.in_naming("titan-0.3", layer)): torch.full(role.shape(PARAMS), float(value))
        for role, layer in every_role(PARAMS)
    }
    dcp.save(renamed(named, naming), checkpoint_id=folder, no_dist=True)


def renamed(weights: dict[str, torch.Tensor], naming: str) -> dict[str, torch.Tensor]:
    """A state of titan-0.3 as another generation stores it."""
    if naming == "titan-main":
        return of_main(weights, PARAMS)
    return {
        str(role.in_naming(naming, layer)): weights[str(role.in_naming("titan-0.3", layer))]
        for role, layer in every_role(PARAMS)
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Steps 5, 40 and 100 as TorchTitan saves them, and a folder with their config.json."""
    checkpoints.write_model(tmp_path / "assets", PARAMS)
    for n in (5, 40, 100):
        save(tmp_path / f"run/checkpoint/step-{n}", "titan-0.3", n)
    return tmp_path / "run/checkpoint"


def convert(run: Path, *more: str) -> int:
    words = ["convert", str(run), str(run.parents[1] / "hf"), "--every-step", *more]
    return main([*words, "--assets", str(run.parents[1] / "assets")])


def first_values(target: Path) -> dict[str, float]:
    return {
        step.name: load_file(step / "model.safetensors")["model.norm.weight"][0].item()
        for step in target.iterdir()
    }


def test_every_step_is_converted_under_its_own_name(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(run, "--json") == 0
    assert first_values(tmp_path / "hf") == {"step-5": 5, "step-40": 40, "step-100": 100}
    printed = json.loads(capsys.readouterr().out)
    targets = [Path(one["target"]).name for one in printed["steps"]]
    assert targets == ["step-5", "step-40", "step-100"]
    assert printed["ok"]
    assert printed["verified"]
    assert printed["bytes_written"] == sum(one["bytes_written"] for one in printed["steps"])
    assert str(tmp_path / "hf/step-100") in printed["next"]


def test_second_run_skips_what_is_current_and_converts_new_steps(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(run, "--quiet") == 0
    shutil.copytree(run / "step-5", run / "step-200")
    before = (tmp_path / "hf/step-5/llamaconv.json").read_bytes()
    assert convert(run) == 0
    assert (tmp_path / "hf/step-5/llamaconv.json").read_bytes() == before
    lines = capsys.readouterr().out.splitlines()
    assert sum("converted before; skipped" in line for line in lines) == 3
    assert next(line for line in lines if "converted in" in line).startswith(
        str(tmp_path / "hf/step-200")
    )
    assert convert(run, "--overwrite") == 0
    assert "skipped" not in capsys.readouterr().out
    assert set(first_values(tmp_path / "hf")) == {"step-5", "step-40", "step-100", "step-200"}


@pytest.mark.parametrize("change", ["saved again", "other options", "no receipt"])
def test_existing_target_of_another_conversion_is_refused_before_anything_is_written(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    assert convert(run, "--quiet") == 0
    shutil.rmtree(tmp_path / "hf/step-5")
    options = []
    if change == "saved again":  # the training was restarted
        (file,) = run.glob("step-40/*.distcp")
        os.utime(file, (2e9, 2e9))
    elif change == "other options":
        options = ["--dtype", "bfloat16"]
    else:
        (tmp_path / "hf/step-40/llamaconv.json").unlink()
    assert convert(run, *options) == 2
    (error,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error:")]
    assert "step-40: exists already" in error
    assert not (tmp_path / "hf/step-5").exists()


def test_incomplete_step_is_named_and_skipped(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "step-100/.metadata").unlink()
    (run / "logs").mkdir()
    assert convert(run) == 0
    assert set(first_values(tmp_path / "hf")) == {"step-5", "step-40"}
    (warning,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("warning:")]
    assert f"{run / 'step-100'}: skipped" in warning


def test_error_in_any_step_stops_before_the_first_is_written(run: Path, tmp_path: Path) -> None:
    shutil.rmtree(run / "step-100")
    dcp.save({"norm.weight": torch.ones(64)}, checkpoint_id=run / "step-100", no_dist=True)
    assert convert(run) == 2
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("below", "words"),
    [
        ("../..", "no complete folders of steps"),
        ("step-5", "Leave out --every-step"),
        ("missing", "not found"),
    ],
)
def test_folder_without_steps_is_refused_with_the_remedy(
    run: Path, capsys: pytest.CaptureFixture[str], below: str, words: str
) -> None:
    source = run.parents[1] if below == "../.." else run / below
    target = str(run.parents[1] / "hf")
    assert main(["convert", str(source), target, "--every-step"]) == 2
    assert words.format(run=run) in capsys.readouterr().err


def test_the_folder_around_the_steps_folder_will_do(run: Path, tmp_path: Path) -> None:
    words = ["convert", str(run.parent), str(tmp_path / "hf"), "--every-step", "--quiet"]
    assert main([*words, "--assets", str(tmp_path / "assets")]) == 0
    assert first_values(tmp_path / "hf") == {"step-5": 5, "step-40": 40, "step-100": 100}


@pytest.mark.parametrize("up", [0, 1])
def test_without_the_option_the_newest_step_is_taken_and_that_is_said(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], up: int
) -> None:
    given = (run, run.parent)[up]
    words = ["convert", str(given), str(tmp_path / "hf"), "--assets", str(tmp_path / "assets")]
    assert main([*words, "--quiet"]) == 0
    assert load_file(tmp_path / "hf/model.safetensors")["model.norm.weight"][0] == 100
    said = capsys.readouterr().err
    assert f"{given}: a run of 3 steps; the newest is taken, {run / 'step-100'}" in said
    assert "--every-step" in said
    assert main(["verify", str(given), str(tmp_path / "hf")]) == 0


def test_a_step_that_is_still_written_is_not_the_newest(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "step-100/.metadata").unlink()
    # As torch_checkpointing saves, until all of its ranks are done.
    shutil.copytree(run / "step-40", run / "tmp_step-200")
    assert main(["inspect", str(run)]) == 0
    said = capsys.readouterr().err
    assert f"the newest is taken, {run / 'step-40'}; not a complete step: step-100" in said
    assert convert(run, "--quiet") == 0
    assert set(first_values(tmp_path / "hf")) == {"step-5", "step-40"}


@pytest.mark.parametrize("naming", ["titan-0.2", "titan-main"])
def test_steps_of_several_generations_are_one_error(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], naming: str
) -> None:
    save(run / "step-200", naming, 200)
    assert convert(run) == 2
    (error,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error:")]
    assert f"titan-0.3 in step-5, step-40, step-100; {naming} in step-200" in error
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("naming", ["titan-0.3", "titan-main", "titan-0.2", "titan-2024"])
@pytest.mark.parametrize(
    "front",
    ["model.", "_orig_mod.", "module.", "state_dict.", "state_dict.model._orig_mod.", "app.model."],
)
def test_wrappers_in_front_of_the_names_of_any_generation_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], naming: str, front: str
) -> None:
    assets = str(checkpoints.write_model(tmp_path / "assets", PARAMS))
    weights = {
        str(role.in_naming("titan-0.3", layer)): torch.randn(role.shape(PARAMS))
        for role, layer in every_role(PARAMS)
    }
    dcp.save(weights, checkpoint_id=tmp_path / "plain", no_dist=True)
    stored = renamed(weights, naming)
    stored = {f"{front}{name}": weight for name, weight in stored.items()}
    dcp.save(stored, checkpoint_id=tmp_path / "run/checkpoint/step-7", no_dist=True)
    assert (
        main(["compare", str(tmp_path / "run"), str(tmp_path / "plain"), "--assets", assets]) == 0
    )
    said = capsys.readouterr()
    assert f"{len(weights)} tensors" in said.out
