"""llamaconv's advice, obtained from its command line and put before a TorchTitan release.

The idea: `llamaconv convert` writes `train.sh` and, here always, a module. bash runs that very
script, in its folder, with a torchrun that records its arguments; TorchTitan is then started with them.
Nothing else describes the model. The limit: the arguments before `torchtitan.train` (eight processes)
are left out, and a training also gets what a test needs: a text, a tokenizer, small sizes, fp32.
"""

import json
import shlex
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from support.train_script import started
from titan_env import Titan, convert
from titan_training import FLAGS, OWN_FLAGS

Key = tuple[str, ...]
LAUNCH = ["--nproc-per-node", "8", "-m", "torchtitan.train"]


@dataclass(frozen=True)
class Advice:
    """What one conversion said: where the DCP is, the command, the module's text, the notes.

    `script` is the `train.sh` that it wrote. Command and module are empty, and there is no script, where
    the release has no such model.
    """

    dcp: str
    command: str
    module: str
    notes: tuple[str, ...]
    script: Path | None
    without_conversion: str

    def job(self, notes: Path, tokenizer: Path) -> dict[str, Any]:
        """Runs the script; gives its folder, and the words that TorchTitan gets to read there."""
        assert self.script
        folder, words = started(self.script, notes, TOKENIZER=str(tokenizer))
        assert words[: len(LAUNCH)] == LAUNCH
        return {"folder": folder, "words": words[len(LAUNCH) :]}

    def job_without_conversion(self, folder: Path) -> dict[str, Any]:
        """The words that start from the source as it is, in a folder without a module."""
        folder.mkdir()
        torchrun, *words = shlex.split(self.without_conversion)
        assert [torchrun, *words[: len(LAUNCH)]] == ["torchrun", *LAUNCH]
        return {"folder": str(folder), "words": words[len(LAUNCH) :]}


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
    script = Path(said["written"][0]) if said["written"] else None
    return Advice(
        said["target"],
        said["next"],
        said["module"],
        tuple(said["notes"]),
        script,
        said["without_conversion"],
    )


def logits(titan: Titan, asked: dict[Key, Asked]) -> dict[Key, torch.Tensor]:
    """The logits of TorchTitan for each thing asked.

    All in one process, since TorchTitan takes far longer to import than to run a small model.
    """
    runs = []
    folder = Path(mkdtemp(prefix="words-", dir=titan.scratch))
    for i, (advice, dcp, ids) in enumerate(asked.values()):
        job = advice.job(folder / f"{i}", tokenizer=titan.scratch)
        runs.append(job | {"name": f"{i}", "dcp": dcp, "tokens": ids.tolist()})
    saved, _ = titan.run("logits", {"runs": runs}, folder.name, "advice_side.py")
    return dict(zip(asked, saved.values(), strict=True))


def train(titan: Titan, advice: Advice, corpus: Path, name: str, converted: bool = True) -> Start:
    """Trains one step with the advised words and what a test adds to them."""
    dump, assets, data = OWN_FLAGS[titan.release.version]
    if converted:
        job = advice.job(titan.scratch / f"words {name}", tokenizer=corpus)
        assert assets in job["words"]
    else:
        job = advice.job_without_conversion(titan.scratch / f"words {name}")
    added = FLAGS | {"--training.steps": "1", assets: str(corpus), data: str(corpus / "data")}
    # c4_test reads any folder; c4, which the advice for 0.3.0 takes over from 8B, does not.
    added[data.removesuffix("_path")] = "c4_test"
    if dump not in job["words"]:
        added[dump] = str(titan.scratch / f"dump {name}")
    job["words"] += [word for flag in added.items() for word in flag]
    steps, printed = titan.run("train", job, f"advice {name}", "advice_side.py")
    return Start(advice, steps[0], printed)
