"""The command line's contract: what it prints where, and its exit status."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch

from llamaconv import sample_path
from llamaconv.cli import main


@pytest.fixture
def sample() -> str:
    return str(sample_path())


def test_help_names_every_option_of_the_contract(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["convert", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for option in [
        "--to",
        "--generation",
        "--rope",
        "--dtype",
        "--shards",
        "--tie",
        "--as-step-0",
        "--workers",
        "--overwrite",
        "--no-verify",
        "--quiet",
        "--json",
    ]:
        assert option in text


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
    assert "Next:\n# TorchTitan 0.3.0\n" in said.out
    assert f"--checkpoint.initial_load_path {target}" in said.out
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

    verified = run("verify", sample, target)
    assert verified["ok"] is True
    assert {"name", "ok", "value", "yardstick"} <= set(verified["checks"][0])

    looked = run("inspect", target)
    assert looked["format"] == "dcp"
    assert looked["generation"] == "titan-0.3"
    assert looked["rope"] == "interleaved"


@pytest.mark.parametrize("command", ["inspect", "plan", "convert", "verify"])
def test_a_source_that_is_not_there_is_refused(
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
    assert "is not there" in said[0]
    assert not (tmp_path / "target").exists()


def test_every_problem_is_a_line_and_the_target_untouched(
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
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(folder), "--json"])
    assert ended.value.code == 2
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
    with pytest.raises(SystemExit) as ended:
        main(["verify", sample, str(target)])
    assert ended.value.code == 1
    said = capsys.readouterr()
    assert "error: check bits failed: 1 of 820,352 elements differ" in said.err
    assert "✗" in said.out


def test_quiet_says_nothing(
    sample: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", sample, str(tmp_path / "dcp"), "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


def test_our_own_output_is_not_converted_again(
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
