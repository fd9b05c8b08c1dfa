"""The command line's contract: what it prints where, and its exit status."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import checkpoints
from torch.distributed.checkpoint import save

from llamaconv import sample_path
from llamaconv.cli import main


@pytest.fixture
def sample() -> str:
    return str(sample_path())


TARGET = (
    "--to --generation --rope --dtype --shards --max-shard-size --tie --assets --with-optimizer"
)
OPTIONS = {
    "sample": "",
    "notebooks": "--open --json",
    "inspect": "--all --values --tensor --against --json",
    "compare": "--all --assets --run --json",
    "plan": f"{TARGET} --json",
    "convert": f"{TARGET} --as-step-0 --every-step --workers --overwrite --no-verify --quiet --json",
    "verify": "--run --json",
}


@pytest.mark.parametrize("command", OPTIONS)
def test_help_has_the_options_of_the_contract_and_no_others(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    offered = set(re.findall(r"^ +(?:-h, )?(--[a-z0-9-]+)", capsys.readouterr().out, re.MULTILINE))
    assert offered == {"--help", *OPTIONS[command].split()}


def test_sample_then_inspect_then_convert_then_verify(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = str(tmp_path / "sample"), str(tmp_path / "dcp")
    assert main(["sample", source]) == 0
    assert f"llamaconv convert {source} {source}-dcp" in capsys.readouterr().out
    assert main(["inspect", source]) == 0
    assert "4 layers of width 128, 8 heads of 16, 2 kv heads" in capsys.readouterr().out
    assert main(["convert", source, target]) == 0
    said = capsys.readouterr()
    assert "every check passed" in said.out
    *_, wrote, command = said.out.splitlines()
    assert wrote == f"{target}-train: wrote train.sh and converted_llama.py for TorchTitan 0.3.0"
    assert command == f"bash {target}-train/train.sh"
    assert "verifying: 1.64 MB of 1.64 MB" in said.err
    assert main(["verify", source, target]) == 0
    assert "rotated scores" in capsys.readouterr().out
    assert main(["sample", source]) == 2
    assert "exists already" in capsys.readouterr().err


def test_json_is_one_object_and_nothing_else(
    sample: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = str(tmp_path / "dcp")

    def run(*arguments: str) -> dict[str, Any]:
        assert main([*arguments, "--json"]) == 0
        said = capsys.readouterr()
        assert said.err == ""
        return json.loads(said.out)

    looked = run("inspect", sample)
    assert looked["format"] == "huggingface"
    assert looked["rope"] == "half_split"
    assert looked["params"]["n_kv_heads"] == 2
    assert looked["generation"] is None
    assert looked["total_bytes"] == 1640704
    assert len(looked["tensors"]) == 39
    assert {"name", "dtype", "shape", "files"} == set(looked["tensors"][0])
    assert looked["problems"] == looked["ignored"] == []

    plan = run("plan", sample, "--generation", "titan-0.2")
    assert {"source", "target", "operation", "dtype", "shape"} <= set(plan["moves"][0])
    assert plan["bytes_to_read"] == plan["bytes_to_write"] == 1640704
    assert plan["peak_memory_bytes"] < 500e6
    assert plan["problems"] == []

    done = run("convert", sample, target)
    assert done["ok"] is done["verified"] is True
    assert done["target"] == target
    assert done["bytes_read"] == done["bytes_written"] == 1640704
    assert done["seconds"] > 0
    assert target in done["next"]
    assert f"--hf_assets_path {sample}" in done["next"]
    assert done["written"] == [
        f"{target}-train/{name}" for name in ("train.sh", "converted_llama.py")
    ]
    assert Path(done["written"][1]).read_text().startswith(done["module"])

    verified = run("verify", sample, target)
    assert verified["ok"] is True
    assert {"name", "ok", "value", "yardstick"} <= set(verified["checks"][0])

    looked = run("inspect", target)
    assert looked["format"] == "dcp"
    assert looked["generation"] == "titan-0.3"
    assert looked["rope"] == "interleaved"


@pytest.mark.parametrize("command", ["inspect", "plan", "convert", "verify"])
def test_missing_source_is_refused(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [command, str(tmp_path / "nowhere")]
    if command == "verify":
        arguments = ["verify", str(tmp_path / "nowhere"), str(tmp_path / "target")]
    elif command == "convert":
        arguments.append(str(tmp_path / "target"))
    assert main(arguments) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("error: ")
    assert "not found" in said[0]
    assert not (tmp_path / "target").exists()


def test_every_problem_is_one_line_and_the_target_is_unchanged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = checkpoints.tensors()
    weights["model.alien.weight"] = torch.ones(2)
    del weights["model.norm.weight"]
    folder = checkpoints.write(tmp_path / "hf", weights, num_key_value_heads=4, hidden_act="gelu")
    (folder / "model-00002-of-00003.safetensors").write_bytes(b"version https://git-lfs")
    assert main(["convert", str(folder), str(tmp_path / "target")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) >= 5
    assert all(line.startswith(("error: ", "warning: ")) for line in said)
    text = "\n".join(said)
    for words in ("Git-LFS", "alien", "gelu", "model.norm.weight", "k_proj.weight"):
        assert words in text
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_plan_with_problems_is_shown_and_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoints.write(tmp_path / "hf", num_key_value_heads=4)
    assert main(["plan", str(folder), "--json"]) == 2
    said = capsys.readouterr()
    assert json.loads(said.out)["problems"]
    assert said.err.startswith("error: ")


def test_a_failed_check_is_status_1(
    sample: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "dcp"
    assert main(["convert", sample, str(target), "--quiet"]) == 0
    file = target / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert main(["verify", sample, str(target)]) == 1
    said = capsys.readouterr()
    assert "error: check bits failed: 1 of 820,352 elements differ" in said.err
    assert "✗" in said.out


def test_quiet_conversion_prints_nothing(
    sample: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", sample, str(tmp_path / "dcp"), "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


def test_target_of_a_conversion_is_not_converted_again(
    sample: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", sample, str(tmp_path / "dcp"), "--quiet"]) == 0
    assert main(["convert", str(tmp_path / "dcp"), str(tmp_path / "again"), "--to", "dcp"]) == 2
    said = capsys.readouterr().err
    assert "is dcp titan-0.3, interleaved rows already; there is nothing to convert" in said
    assert not (tmp_path / "again").exists()


def test_names_from_files_cannot_drive_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = checkpoints.tensors()
    weights["\x1b[2J\x07evil\nerror: fake"] = torch.ones(2)
    folder = checkpoints.write(tmp_path / "hf", weights)
    main(["inspect", str(folder)])
    assert main(["convert", str(folder), str(tmp_path / "target")]) == 2
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err
    assert "\x07" not in said.out + said.err
    assert "\\x1b[2J\\x07evil\\nerror: fake" in said.err


def test_the_module_and_the_script_are_the_same_program() -> None:
    for command in (
        [sys.executable, "-m", "llamaconv"],
        [str(Path(sys.executable).with_name("llamaconv"))],
    ):
        done = subprocess.run([*command, "--version"], capture_output=True, text=True)
        assert done.stdout.startswith("llamaconv 0.")


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "llamaconv", "inspect", str(tmp_path / "nowhere")],
        capture_output=True,
        text=True,
        env={"LLAMACONV_DEBUG": "1", "PATH": ""},
    )
    assert "Traceback" in done.stderr


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "latin-1"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
    ids=["latin-1", "locale C"],
)
def test_output_without_a_sign_for_it_is_replaced(environment: dict[str, str]) -> None:
    """Neither has a sign for ×; what is found is right and is said with a ?."""
    done = subprocess.run(
        [sys.executable, "-m", "llamaconv", "inspect", str(sample_path())],
        capture_output=True,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert b"128 ? 128" in done.stdout or b"\xd7" in done.stdout


def test_inspect_of_a_damaged_checkpoint_is_status_2(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (source / "model-00002-of-00003.safetensors").unlink()
    assert main(["inspect", str(source)]) == 2
    assert "model-00002-of-00003.safetensors: not found" in capsys.readouterr().err


@pytest.mark.parametrize("cause", ["size", "head", "empty", "float8"])
def test_inspect_is_status_2_for_what_every_conversion_refuses(
    cause: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, changes = checkpoints.tensors(), dict[str, Any]()
    name = "model.layers.1.mlp.up_proj.weight"
    if cause == "size":
        changes["hidden_size"] = 96
    elif cause == "head":
        del weights["lm_head.weight"]
    else:
        weights[name] = (
            torch.empty(0) if cause == "empty" else weights[name].to(torch.float8_e4m3fn)
        )
    folder = checkpoints.write(tmp_path / "odd", weights, **changes)
    assert main(["inspect", str(folder), "--json"]) == 2
    said = capsys.readouterr()
    (error,) = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert json.loads(said.out)["problems"] == [error.removeprefix("error: ")]
    assert main(["convert", str(folder), str(tmp_path / "target")]) == 2
    assert error in capsys.readouterr().err


def test_inspect_is_status_0_for_what_only_a_target_lacks(tmp_path: Path) -> None:
    weights = checkpoints.tensors()
    save(weights, checkpoint_id=tmp_path / "dcp", no_dist=True)
    biased = {**weights, "model.layers.0.self_attn.o_proj.bias": torch.ones(64)}
    folder = checkpoints.write(tmp_path / "biased", biased)
    assert main(["inspect", str(tmp_path / "dcp")]) == 0, "no parameters are known"
    assert main(["inspect", str(folder)]) == 0, "a DCP has no biases"
    shard = checkpoints.write(tmp_path / "source", weights) / "model-00001-of-00003.safetensors"
    assert main(["inspect", str(shard)]) == 0, "one file of three"
