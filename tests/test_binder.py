"""binder/: what can be run of it here, and that it asks for what the package asks for."""

import os
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# conda-forge's names where they differ from PyPI's.
CONDA = {"torch": "pytorch-cpu", "xxhash": "python-xxhash", "matplotlib": "matplotlib-base"}


def test_the_environment_has_every_requirement_with_its_range() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["notebooks"]]
    environment = (ROOT / "binder" / "environment.yml").read_text()
    listed = re.findall(r"^  - (.+)$", environment, re.MULTILINE)
    for requirement in wanted:
        name, bounds = re.fullmatch(r"([\w-]+)(.*)", requirement).groups()  # type: ignore[union-attr]
        assert f"{CONDA.get(name, name)}{bounds}" in listed


@pytest.mark.thorough
def test_the_post_build_step_installs_the_checkout_and_nothing_else(tmp_path: Path) -> None:
    script = ROOT / "binder" / "postBuild"
    assert os.access(script, os.X_OK)
    assert "set -e" in script.read_text()
    # As in the visitor's environment, the requirements are there before it runs.
    venv.create(tmp_path / "env", with_pip=True, system_site_packages=True)
    site = next((tmp_path / "env" / "lib").glob("python*")) / "site-packages"
    (site / "here.pth").write_text("\n".join(p for p in sys.path if "site-packages" in p))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["PATH"] = f"{tmp_path / 'env' / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(
        [str(script)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert (site / "llamaconv" / "convert" / "convert.py").is_file()
    assert not (site / "torch").exists()
