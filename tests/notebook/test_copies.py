"""`llamaconv notebooks`: the notebooks travel with the package, from a checkout and from a wheel."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from llamaconv.cli import main

ROOT = Path(__file__).parents[2]
ORIGINALS = {path.name: path.read_bytes() for path in (ROOT / "notebooks").glob("*.ipynb")}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_notebooks_are_written_and_the_command_that_opens_them_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "my notebooks"
    assert main(["notebooks", str(folder)]) == 0
    assert content(folder) == ORIGINALS
    assert f"next: jupyter lab '{folder}'" in capsys.readouterr().out
    assert main(["notebooks", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["next"] == ["jupyter", "lab", str(folder)]


def test_edited_notebooks_are_named_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "4-convert.ipynb").write_text("mine")
    (tmp_path / "5-verify.ipynb").symlink_to(tmp_path / "elsewhere")
    assert main(["notebooks", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "4-convert.ipynb: exists already" in said
    assert "5-verify.ipynb: exists already" in said
    assert {path.name for path in tmp_path.iterdir()} == {"4-convert.ipynb", "5-verify.ipynb"}
    assert main(["notebooks", "hf://org/name"]) == 2


def test_open_starts_jupyterlab_in_the_folder(tmp_path: Path) -> None:
    lab = tmp_path / "modules" / "jupyterlab"
    lab.mkdir(parents=True)
    (lab / "__init__.py").touch()
    (lab / "__main__.py").write_text("import sys; print('opened', sys.argv[1:])")
    command = [sys.executable, "-m", "llamaconv", "notebooks", str(tmp_path / "here"), "--open"]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path / 'modules'}:{ROOT}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"opened {[str(tmp_path / 'here')]}"
    assert content(tmp_path / "here") == ORIGINALS


@pytest.mark.thorough
def test_a_wheel_has_the_notebooks_and_writes_them(tmp_path: Path) -> None:
    tree, site = tmp_path / "tree", sysconfig.get_path("purelib")
    for name in ("llamaconv", "notebooks"):
        shutil.copytree(ROOT / name, tree / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    venv.create(tmp_path / "env", with_pip=True)
    programs = tmp_path / "env" / "bin"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def run(*command: object) -> None:
        subprocess.run([*map(str, command)], check=True, cwd=tmp_path, env=environment)

    run(programs / "pip", "wheel", tree, "--no-deps", "--quiet", "--wheel-dir", tmp_path)
    (file,) = tmp_path.glob("*.whl")
    run(programs / "pip", "install", "--no-deps", "--quiet", file)
    # Its dependencies are those of this environment; the package is the wheel's.
    environment["PYTHONPATH"] = site
    run(programs / "llamaconv", "notebooks", tmp_path / "here")
    assert content(tmp_path / "here") == ORIGINALS
