"""The programs that llamaconv is compared with, and what each does otherwise.

A peer is a script of `peers/` that takes a source and a target. One that needs a package has an
environment of its own, made once as the interop tests make theirs (`LLAMACONV_INTEROP_ENVS`, so
that both can share them); the others run where this runs, with the same torch.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "interop"))
import titan_env  # noqa: E402


@dataclass(frozen=True)
class Peer:
    """A program to compare with: directions, script, environment, what it does otherwise.

    A DCP that it reads has the key names of its ``generation``.
    """

    name: str
    directions: tuple[str, ...]
    script: str
    otherwise: str
    environment: str = ""
    installs: tuple[str, ...] = ()
    generation: str = "titan-0.3"

    def command(self, envs: Path) -> list[str]:
        """How it is called, source and target apart. Raises `RuntimeError` without environment."""
        python = sys.executable if not self.environment else str(self._python(envs))
        return [python, str(HERE / "peers" / self.script)]

    def _python(self, envs: Path) -> Path:
        os.environ["LLAMACONV_INTEROP_ENVS"] = str(envs)
        try:
            return titan_env.make_environment(self.environment, self.installs)
        except pytest.fail.Exception as error:
            last = str(error).strip().splitlines()[-1]
            raise RuntimeError(f"could not be installed: {last}") from None


_TITAN = "writes float32, twice the bytes; to Hugging Face each file twice, its parts too"
_RELEASE = {release.version: release.installs for release in titan_env.RELEASES}
PEERS = [
    Peer(
        "load everything",
        ("hf-dcp",),
        "load_everything.py",
        "the method of most published scripts",
    ),
    Peer(
        "torch, HuggingFaceStorageReader",
        ("hf-dcp",),
        "torch_reader.py",
        "keeps names and rows: TorchTitan cannot load it",
    ),
    Peer(
        "TorchTitan 0.2.2",
        ("hf-dcp", "dcp-hf", "cast"),
        "titan_convert.py",
        f"{_TITAN}; its names",
        "torchtitan-0.2.2-safetensors",
        (*_RELEASE["0.2.2"], "safetensors"),
        "titan-0.2",
    ),
    Peer(
        "TorchTitan 0.3.0",
        ("hf-dcp", "dcp-hf", "cast"),
        "titan_convert.py",
        _TITAN,
        "torchtitan-0.3.0",
        _RELEASE["0.3.0"],
    ),
    Peer(
        "torchtune 0.6.1",
        ("hf-dcp",),
        "torchtune_convert.py",
        "torchtune's names",
        "torchtune-0.6.1",
        # A later torchao lacks what torchtune imports, an earlier one does not import with torch 2.13.
        ("torchtune==0.6.1 torchao==0.15.0",),
    ),
    Peer(
        "torch, dcp_to_torch_save",
        ("dcp-hf",),
        "torch_formats.py",
        "one torch.save file; keeps names and rows",
    ),
    Peer(
        "torch, torch_save_to_dcp",
        ("meta-dcp",),
        "torch_formats.py",
        "keeps names",
    ),
    Peer(
        "LitGPT 0.5.13",
        ("hf-meta",),
        "litgpt_convert.py",
        "one .pth of its own names, q, k and v in one matrix, rows half_split",
        "litgpt-0.5.13",
        ("litgpt==0.5.13",),
    ),
]


def chosen(words: str) -> list[Peer]:
    """``all``, ``none``, or names that begin with one of the words between commas."""
    if words in ("all", "none"):
        return PEERS if words == "all" else []
    wanted = [word.strip().lower() for word in words.split(",")]
    found = [peer for peer in PEERS if peer.name.lower().startswith(tuple(wanted))]
    if not found:
        raise SystemExit(f"no peer is called {words}; there are {', '.join(p.name for p in PEERS)}")
    return found
