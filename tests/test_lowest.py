"""The bounds in pyproject.toml: what .ci/lowest makes of them for the job of CI that installs the lowest."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from llamaconv.checkpoint import hub

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / ".ci" / "lowest"
PYPROJECT = (ROOT / "pyproject.toml").read_text()


def lowest(script: Path = SCRIPT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, script], capture_output=True, text=True)


def test_each_requirement_but_torch_is_pinned_to_its_lower_bound() -> None:
    project = tomllib.loads(PYPROJECT)["project"]
    pinned = {line.replace("==", ">=") for line in lowest().stdout.splitlines()}
    wanted = [*project["dependencies"]]
    for extra in project["optional-dependencies"].values():
        wanted += extra
    left_out = [each for each in wanted if re.sub(r"\[.*\]", "", each).split(",")[0] not in pinned]
    assert [each for each in left_out if not each.startswith(("llamaconv[", "torch>="))] == []
    assert len(pinned) == len(wanted) - len(left_out) >= 15


def test_a_requirement_with_one_bound_is_named(tmp_path: Path) -> None:
    (tmp_path / ".ci").mkdir()
    script = Path(shutil.copy(SCRIPT, tmp_path / ".ci"))
    for requirement in ("tqdm>=4.66", "tqdm<5", "tqdm"):
        (tmp_path / "pyproject.toml").write_text(PYPROJECT.replace("tqdm>=4.66,<5", requirement, 1))
        done = lowest(script)
        assert done.returncode == 1 and done.stderr.startswith(f"{requirement}: ")


def test_what_a_refusal_says_to_install_is_the_extra() -> None:
    extra = tomllib.loads(PYPROJECT)["project"]["optional-dependencies"]["hub"]
    assert f"pip install '{extra[0]}'" == hub._INSTALL
