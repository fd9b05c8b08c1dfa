"""An environment for each TorchTitan release, made once and kept, and a way to run things in it.

The idea: TorchTitan is the judge, so it gets an interpreter of its own, with the release from PyPI and
without llamaconv or transformers. Environments live in `LLAMACONV_INTEROP_ENVS`, by default `.interop`
in the repository's root; a marker file, written last, says that one is complete and what it was made
from. The limit: two pytest processes must not make the same environment at the same time.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
RUNTIME_0_2 = "torchdata datasets tokenizers tomli fsspec tyro tensorboard einops pillow triton"


@dataclass(frozen=True)
class Release:
    """A TorchTitan release: the key names it reads, and what pip is asked for, in this order."""

    version: str
    generation: str
    installs: tuple[str, ...]

    def make(self) -> Path:
        """The interpreter of this release's environment, which is made if it is not there."""
        home = os.environ.get("LLAMACONV_INTEROP_ENVS") or HERE.parents[1] / ".interop"
        folder = Path(home).resolve() / f"torchtitan-{self.version}"
        python, marker = folder / "bin" / "python", folder / "complete.json"
        # torch comes first and pinned, or torchtitan's own wish would decide which one it is.
        pinned = f"torch=={torch.__version__.partition('+')[0]}"
        recipe = [platform.python_version(), pinned, *self.installs]
        if marker.exists() and json.loads(marker.read_text()) == recipe:
            return python
        shutil.rmtree(folder, ignore_errors=True)
        run([sys.executable, "-m", "venv", str(folder)])
        for arguments in (pinned, *self.installs):
            run([str(python), "-m", "pip", "install", "--quiet", *arguments.split()])
        marker.write_text(json.dumps(recipe))
        return python


RELEASES = [
    # 0.2.2 does not declare triton, which it imports, so all that it needs is named here.
    Release("0.2.2", "titan-0.2", (RUNTIME_0_2, "--no-deps torchtitan==0.2.2")),
    Release("0.3.0", "titan-0.3", ("torchtitan==0.3.0 triton",)),
]


@dataclass(frozen=True)
class Titan:
    """One TorchTitan release, ready to run."""

    release: Release
    python: Path
    scratch: Path

    def run(self, mode: str, job: dict[str, Any], name: str) -> tuple[Any, str]:
        """Runs titan_side.py on a job; gives what it saved and what it printed."""
        job = job | {"out": str(self.scratch / f"{name}.pt")}
        path = self.scratch / f"{name}.json"
        path.write_text(json.dumps(job))
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RANK")}
        environment |= {"HF_HOME": str(self.scratch / "hf"), "HF_HUB_OFFLINE": "1"}
        printed = run([str(self.python), str(HERE / "titan_side.py"), mode, str(path)], environment)
        return torch.load(job["out"], weights_only=True), printed


@pytest.fixture(
    scope="session", params=RELEASES, ids=lambda release: f"torchtitan-{release.version}"
)
def titan(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Titan:
    release = request.param
    return Titan(release, release.make(), tmp_path_factory.mktemp(f"torchtitan-{release.version}"))


def run(command: list[str], environment: dict[str, str] | None = None) -> str:
    """Runs a command to its end and gives what it printed; a failure shows the end of that."""
    done = subprocess.run(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-40:])
        pytest.fail(f"exit status {done.returncode}: {' '.join(command)}\n{tail}", pytrace=False)
    return done.stdout


def convert(source: Path, target: Path, *options: str) -> Path:
    """Converts by the command line, as a user would."""
    command = [sys.executable, "-m", "llamaconv", "convert", str(source), str(target), "--quiet"]
    run([*command, *options])
    return target
