"""llamaconv's advice, obtained from its command line and put before a TorchTitan release.

The idea: `llamaconv convert --json` gives a command and, here always, the text of a module; the text is
saved as the command expects it, the command's words go to TorchTitan, and nothing but that describes
the model. The limit: of the command, what comes before `torchtitan.train` (torchrun, eight processes)
is left out, and a training gets what a test needs beside it: a text, a tokenizer, small sizes, fp32.
"""

import json
import shlex
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from titan_env import Titan, convert
from titan_training import FLAGS, OWN_FLAGS

Key = tuple[str, ...]
LAUNCH = "torchrun --nproc-per-node 8 -m torchtitan.train "


@dataclass(frozen=True)
class Advice:
    """What one conversion said: where the DCP is, the command, the module's text, the notes.

    Command and module are empty where the release has no such model.
    """

    dcp: str
    command: str
    module: str
    notes: tuple[str, ...]

    def job(self, folder: Path) -> dict[str, Any]:
        """Saves the module in a new folder; gives that, and the words that TorchTitan gets to read."""
        folder.mkdir()
        (folder / "converted_llama.py").write_text(self.module)
        assert self.command.startswith(LAUNCH), self.command
        return {"folder": str(folder), "words": shlex.split(self.command.removeprefix(LAUNCH))}


# An advice, the DCP to load (mostly its own), and rows of token ids.
Asked = tuple[Advice, str, torch.Tensor]


@dataclass(frozen=True)
class Start:
    """The first step of a training: what it began from, its batch and loss, and what was printed."""

    advice: Advice
    step: dict[str, Any]
    printed: str


def advised(titan: Titan, source: Path, target: str, *options: str) -> Advice:
    """Converts for a release by the command line's own entry, and takes down its advice."""
    options = ("--generation", titan.release.generation, "--json", *options)
    printed = StringIO()
    with redirect_stdout(printed):
        convert(source, titan.scratch / target, *options)
    said = json.loads(printed.getvalue())
    return Advice(said["target"], said["next"], said["module"], tuple(said["notes"]))


def logits(titan: Titan, asked: dict[Key, Asked]) -> dict[Key, torch.Tensor]:
    """The logits of TorchTitan for each thing asked.

    All in one process, since TorchTitan takes far longer to import than to run a small model.
    """
    runs = []
    for i, (advice, dcp, ids) in enumerate(asked.values()):
        job = advice.job(titan.scratch / f"module {i}")
        runs.append(job | {"name": f"{i}", "dcp": dcp, "tokens": ids.tolist()})
    saved, _ = titan.run("logits", {"runs": runs}, "advice", "advice_side.py")
    return dict(zip(asked, saved.values(), strict=True))


def train(titan: Titan, advice: Advice, corpus: Path, name: str) -> Start:
    """Trains one step with the advised words and what a test adds to them."""
    job = advice.job(titan.scratch / f"module {name}")
    dump, assets, data = OWN_FLAGS[titan.release.version]
    added = FLAGS | {"--training.steps": "1", assets: str(corpus), data: str(corpus / "data")}
    # c4_test reads any folder; c4, which the advice for 0.3.0 takes over from 8B, does not.
    added[data.removesuffix("_path")] = "c4_test"
    if dump not in job["words"]:
        added[dump] = str(titan.scratch / f"dump {name}")
    job["words"] += [word for flag in added.items() for word in flag]
    steps, printed = titan.run("train", job, f"advice {name}", "advice_side.py")
    return Start(advice, steps[0], printed)
