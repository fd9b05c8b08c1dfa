"""Two training steps of a TorchTitan release from our step-0, with the flags that a user would give.

The idea: TorchTitan's own trainer, tokenizer, data loader and checkpoint manager run, and each batch is
noted, so that transformers can be asked for the loss on the same tokens. The limit: one process without
a GPU, in fp32, and a text of random words.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_side import KINDS, POSITIONS, VOCABULARY, tokens
from titan_env import Titan, run
from tokenizers import Tokenizer, models, pre_tokenizers

KIND = "factor 8"  # the scaling that the stock flavours of both releases have

FLAGS = {
    "--training.local_batch_size": "2",
    "--training.seq_len": f"{POSITIONS}",
    "--training.steps": "2",
    "--training.mixed_precision_param": "float32",  # bfloat16 unless told
    "--checkpoint.interval": "1",
    "--lr_scheduler.warmup_steps": "0",
    "--metrics.log_freq": "1",
}
OWN_FLAGS = {
    "0.2.2": ("--job.dump_folder", "--model.hf_assets_path", "--training.dataset_path"),
    "0.3.0": ("--dump_folder", "--hf_assets_path", "--dataloader.dataset_path"),
}


@dataclass(frozen=True)
class Training:
    """What one run left: its dump folder, each step's batch and loss, and what it printed."""

    dump: Path
    steps: list[dict[str, Any]]
    printed: str


def write_corpus(home: Path, rows: int = 8) -> Path:
    """A tokenizer of a word a token, and one long text: one document fills every row.

    With one document a row, the dense causal mask of the test's flavour and the block mask of 0.3.0's
    stock flavours are the same.
    """
    words = ["<s>", "</s>", *(f"w{i}" for i in range(2, VOCABULARY))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(home / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    (home / "tokenizer_config.json").write_text(json.dumps(special))
    text = " ".join(words[max(i, 2)] for i in tokens(rows=rows, seed=11).flatten().tolist())
    (home / "data").mkdir()
    (home / "data" / "text.json").write_text(json.dumps({"text": text}) + "\n")
    return home


def train(titan: Titan, source: Path, corpus: Path, rope: str) -> Training:
    """Converts to `step-0` of a dump folder of its own, and trains two steps from it."""
    release, dump = titan.release, titan.scratch / f"dump-{rope}"
    how = ["--generation", release.generation, "--rope", rope, "--as-step-0", "--quiet"]
    run([sys.executable, "-m", "llamaconv", "convert", str(source), str(dump), *how])
    places = (str(dump), str(corpus), str(corpus / "data"))
    valued = FLAGS | dict(zip(OWN_FLAGS[release.version], places, strict=True))
    flags = ["--checkpoint.enable", *(word for flag in valued.items() for word in flag)]
    job = {"params": KINDS[KIND].params(), "flags": flags}
    return Training(dump, *titan.run("train", job, f"train-{rope}"))
