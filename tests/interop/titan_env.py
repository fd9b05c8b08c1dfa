"""An environment for each program that judges, made once and kept, and ways to run things.

The idea: a TorchTitan release, or Meta's own model, is the judge, so it gets an interpreter of its own,
with the release from PyPI and without llamaconv or transformers. Environments live in
`LLAMACONV_INTEROP_ENVS`, by default `.interop` in the repository's root; a marker file, written last,
says that one is complete and what it was made from. The limit: two pytest processes must not make the
same environment at the same time.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from llamaconv.cli import main

HERE = Path(__file__).parent
RUNTIME_0_2 = "torchdata datasets tokenizers tyro tensorboard triton safetensors"


@dataclass(frozen=True)
class Release:
    """A TorchTitan release: the key names it reads, and what pip is asked for, in this order."""

    version: str
    generation: str
    installs: tuple[str, ...]

    def make(self) -> Path:
        return make_environment(f"torchtitan-{self.version}", self.installs)


RELEASES = [
    # Neither declares triton, which both import. Of what 0.2.2 declares, Llama 3 needs only these, with
    # safetensors for a start from a Hugging Face folder.
    Release("0.2.2", "titan-0.2", (RUNTIME_0_2, "--no-deps torchtitan==0.2.2")),
    # torch_checkpointing, which is to follow DCP, asks for nothing that is not there.
    Release(
        "0.3.0", "titan-0.3", ("torchtitan==0.3.0 triton", "--no-deps torch_checkpointing==0.1.1")
    ),
]


@dataclass(frozen=True)
class Titan:
    """One TorchTitan release, ready to run."""

    release: Release
    python: Path
    scratch: Path

    def run(
        self, mode: str, job: dict[str, Any], name: str, script: str = "titan_side.py"
    ) -> tuple[Any, str]:
        """Runs a script of this folder on a job there; gives what it saved and what it printed."""
        return run_side(self.python, [script, mode], job, self.scratch / name)


def make_environment(name: str, installs: tuple[str, ...]) -> Path:
    """The interpreter of the environment of this name, which is made if it is not there."""
    home = os.environ.get("LLAMACONV_INTEROP_ENVS") or HERE.parents[1] / ".interop"
    folder = Path(home).resolve() / name
    python, marker = folder / "bin" / "python", folder / "complete.json"
    # torch comes first and pinned, or another package's wish would decide which one it is.
    pinned = f"torch=={torch.__version__.partition('+')[0]}"
    recipe = [platform.python_version(), pinned, *installs]
    if marker.exists() and json.loads(marker.read_text()) == recipe:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    run([sys.executable, "-m", "venv", str(folder)])
    for arguments in (pinned, *installs):
        run([str(python), "-m", "pip", "install", "--quiet", *arguments.split()])
    marker.write_text(json.dumps(recipe))
    return python


def run_side(python: Path, words: list[str], job: dict[str, Any], files: Path) -> tuple[Any, str]:
    """Runs a script of this folder, and what follows its name, on a job; its files are `files.*`."""
    job = job | {"out": f"{files}.pt"}
    path = Path(f"{files}.json")
    path.write_text(json.dumps(job))
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RANK")}
    environment |= {"HF_HOME": str(files.parent / "hf"), "HF_HUB_OFFLINE": "1"}
    script, *mode = words
    printed = run([str(python), str(HERE / script), *mode, str(path)], environment)
    return torch.load(job["out"], weights_only=True), printed


def run(command: list[str], environment: dict[str, str] | None = None) -> str:
    """Runs a command to its end and gives what it printed; a failure shows the end of that."""
    done = subprocess.run(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-40:])
        pytest.fail(f"exit status {done.returncode}: {' '.join(command)}\n{tail}", pytrace=False)
    return done.stdout


def convert(source: Path, target: Path, *options: str) -> None:
    """Converts by the command line's own entry, here, since a process each would mostly import."""
    status = main(["convert", str(source), str(target), "--quiet", *options])
    assert status == 0, f"exit status {status}; the captured standard error says why"


def together(work: Callable[[str], Any], names: Iterable[str]) -> dict[str, Any]:
    """Does the work of each name, two at a time: a TorchTitan process mostly imports."""
    with ThreadPoolExecutor(2) as pool:
        begun = {name: pool.submit(work, name) for name in names}
        return {name: each.result() for name, each in begun.items()}
