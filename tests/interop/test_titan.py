"""TorchTitan computes from our checkpoints what transformers computes from the source.

The idea: nobody here wrote either side. `transformers` makes a model and its logits; the command line
converts it; a TorchTitan release loads the result and computes. Each figure stands beside the same one
for a conversion done wrong on purpose: rows of q and k left in Hugging Face's order (`--rope
half_split`), which TorchTitan's rotation misreads. The limit: small random models, one process, fp32.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_side import KINDS, POSITIONS, logits, tokens
from titan_env import Titan, convert

LIMIT = 1e-4  # between two programs in fp32, for logits of up to about 10
FAR = 100 * LIMIT  # what a conversion done wrong must exceed
PLAIN, SCALED, WIDE = "plain", "factor 8", "wide"
OTHERS = {"titan-0.2": ["titan-0.3", "titan-2024"], "titan-0.3": ["titan-0.2", "titan-2024"]}
# The names that each release looks for and the other has otherwise.
MISSED = {
    "titan-0.2": r"layers\.\d+\.attention\.w[qkv]\.weight|output\.weight",
    "titan-0.3": r"layers\.\d+\.attention\.qkv_linear\.w[qkv]\.weight|lm_head\.weight",
}

Answers = dict[str, dict[str, Any]]


@pytest.fixture(scope="session")
def expected(sources: dict[str, Path]) -> dict[str, torch.Tensor]:
    """What transformers makes of each model."""
    return {name: logits(folder, tokens()) for name, folder in sources.items()}


@pytest.fixture(scope="session")
def answers(titan: Titan, sources: dict[str, Path]) -> Answers:
    """What this release makes of each conversion, right or wrong: logits, or an error.

    All in one process, since TorchTitan takes far longer to import than to run a small model.
    """
    mine = titan.release.generation
    conversions: dict[str, tuple[str, list[str]]] = {}
    for kind in KINDS:
        conversions[kind] = kind, ["--generation", mine]
        conversions[f"{kind}, half_split"] = kind, ["--generation", mine, "--rope", "half_split"]
    conversions["three shards"] = PLAIN, ["--generation", mine, "--shards", "3"]
    for other in OTHERS[mine]:
        conversions[other] = PLAIN, ["--generation", other]

    runs = []
    for name, (kind, how) in conversions.items():
        dcp = titan.scratch / name
        convert(sources[kind], dcp, *how)
        runs.append({"name": name, "params": KINDS[kind].params(), "dcp": str(dcp)})
    unscaled = KINDS[SCALED].params() | {"rope_scaling": None}
    runs.append({"name": "no scaling", "params": unscaled, "dcp": str(titan.scratch / SCALED)})
    saved, _ = titan.run("logits", {"tokens": tokens().tolist(), "runs": runs}, "logits")
    return saved


def gap(answer: dict[str, Any], expected: torch.Tensor) -> float:
    """The largest difference of two logits."""
    assert "error" not in answer, answer["error"]
    return (answer["logits"] - expected).abs().max().item()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != WIDE])
def test_titan_gives_the_logits_of_transformers(
    titan: Titan, answers: Answers, expected: dict[str, torch.Tensor], kind: str
) -> None:
    right = gap(answers[kind], expected[kind])
    wrong = gap(answers[f"{kind}, half_split"], expected[kind])
    print(f"TorchTitan {titan.release.version}, {kind}: {right:.1e}, done wrong {wrong:.1f}")
    assert expected[kind].shape[1] == POSITIONS
    assert right <= LIMIT
    assert wrong > FAR, "rows in Hugging Face's order pass, so this test could not have failed"


def test_a_wide_head_fits_0_3_and_is_refused_by_0_2(
    titan: Titan, answers: Answers, expected: dict[str, torch.Tensor]
) -> None:
    """0.2.x has no head_dim: its heads are dim / n_heads rows, and other shapes do not load."""
    if titan.release.generation == "titan-0.2":
        assert "Size mismatch" in answers[WIDE]["error"]
        return
    right = gap(answers[WIDE], expected[WIDE])
    wrong = gap(answers[f"{WIDE}, half_split"], expected[WIDE])
    print(f"TorchTitan {titan.release.version}, {WIDE}: {right:.1e}, done wrong {wrong:.1f}")
    assert right <= LIMIT
    assert wrong > FAR


def test_row_chunks_load_as_whole_tensors_do(answers: Answers) -> None:
    assert torch.equal(answers["three shards"]["logits"], answers[PLAIN]["logits"])


def test_no_checkpoint_carries_the_rope_scaling(
    titan: Titan, answers: Answers, expected: dict[str, torch.Tensor]
) -> None:
    """The same DCP under a flavour without Llama 3.1's scaling loads, and computes something else."""
    wrong = gap(answers["no scaling"], expected[SCALED])
    print(f"TorchTitan {titan.release.version}, factor 8 left out: {wrong:.1f}")
    assert wrong > FAR


def test_the_names_of_other_generations_are_refused(titan: Titan, answers: Answers) -> None:
    for other in OTHERS[titan.release.generation]:
        error = answers[other]["error"]
        assert "Missing key in checkpoint state_dict" in error, f"{other}: {error}"
        if other != "titan-2024":
            missed = re.search(MISSED[titan.release.generation], error)
            assert missed, f"{other}: {error}"
