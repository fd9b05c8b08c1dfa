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

from llamaconv.cli import main
from llamaconv.model.names import every_role

PARAMS = replace(checkpoints.GQA, n_layers=1)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Steps 5, 40 and 100 as TorchTitan saves them, and a folder with their config.json."""
    checkpoints.write_model(tmp_path / "assets", PARAMS)
    for n in (5, 40, 100):
        named = {
            str(role.in_naming("titan-0.3", layer)): torch.full(role.shape(PARAMS), float(n))
            for role, layer in every_role(PARAMS)
        }
        dcp.save(named, checkpoint_id=tmp_path / f"run/checkpoint/step-{n}", no_dist=True)
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
    [("..", "Give {run}"), ("step-5", "Leave out --every-step"), ("missing", "not found")],
)
def test_folder_without_steps_is_refused_with_the_remedy(
    run: Path, capsys: pytest.CaptureFixture[str], below: str, words: str
) -> None:
    source = run.parent if below == ".." else run / below
    target = str(run.parents[1] / "hf")
    assert main(["convert", str(source), target, "--every-step"]) == 2
    assert words.format(run=run) in capsys.readouterr().err


def test_folder_of_steps_without_the_option_is_refused_with_it(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(run), str(run.parents[1] / "hf")]) == 2
    said = capsys.readouterr().err
    assert str(run / "step-100") in said
    assert "--every-step" in said
