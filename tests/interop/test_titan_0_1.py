"""TorchTitan 0.1.0 runs what llamaconv advises for it, and computes what transformers computes.

The idea: as test_advice.py does for later releases, with the advice that a conversion to titan-0.2
gives for the older release that reads the same names. The limit: logits, no training step.
"""

import json
import shlex
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_side import logits, tokens
from titan_env import RELEASES, convert, run, run_side

LIMIT = 1e-4  # between two programs in fp32
FAR = 100 * LIMIT  # what rows in the other layout must exceed
KINDS = ["plain", "a head each"]


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An interpreter with what 0.1.0 needs, and a folder with 0.1.0 itself."""
    python = RELEASES[0].make()
    wheel = tmp_path_factory.mktemp("torchtitan-0.1.0")
    command = [str(python), "-m", "pip", "install", "--quiet", "--target", str(wheel)]
    for wanted in ("tiktoken tomli", "--no-deps torchtitan==0.1.0"):
        run([*command, *wanted.split()])
    return python, wheel


@pytest.fixture(scope="module")
def found(
    older: tuple[Path, Path], sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, torch.Tensor]:
    """0.1.0's logits, by kind of model, and of the same with rows left half_split."""
    home = tmp_path_factory.mktemp("older")
    runs = []
    for kind in KINDS:
        advice: dict[str, Any] = {}
        for rope in ("half_split", "interleaved"):
            printed = StringIO()
            target = home / f"{kind}, {rope}"
            with redirect_stdout(printed):
                convert(
                    sources[kind], target, "--generation", "titan-0.2", "--rope", rope, "--json"
                )
            advice[rope] = json.loads(printed.getvalue())
        (said,) = advice["interleaved"]["older"]
        assert said["release"] == "TorchTitan 0.1.0"
        assert not advice["half_split"]["older"][0]["next"]
        folder = home / f"module of {kind}"
        folder.mkdir()
        (folder / "converted_llama.py").write_text(said["module"])
        words = shlex.split(said["next"].split(" torchtitan.train ")[1])
        for rope, told in advice.items():
            runs.append(
                {
                    "name": f"{kind}, {rope}",
                    "folder": str(folder),
                    "words": words,
                    "dcp": told["target"],
                    "tokens": tokens().tolist(),
                }
            )
    python, wheel = older
    job = {"wheel": str(wheel), "runs": runs}
    result: dict[str, torch.Tensor]
    result, _ = run_side(python, ["titan_0_1_side.py"], job, home / "0.1.0")
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_0_1_0_gives_the_logits_of_transformers(
    found: dict[str, torch.Tensor], sources: dict[str, Path], kind: str
) -> None:
    expected = logits(sources[kind], tokens())
    right, wrong = (
        (found[f"{kind}, {rope}"] - expected).abs().max().item()
        for rope in ("interleaved", "half_split")
    )
    print(f"TorchTitan 0.1.0, {kind}: {right:.1e}, rows left half_split {wrong:.1e}")
    assert right <= LIMIT
    assert wrong > FAR
