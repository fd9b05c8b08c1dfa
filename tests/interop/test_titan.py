"""TorchTitan computes from our checkpoints what transformers computes from the source.

The idea: nobody here wrote either side. `transformers` makes a model and its logits; the command line
converts it; a TorchTitan release loads the result and computes. Each figure stands beside the same one
for a conversion done wrong on purpose: rows of q and k left in Hugging Face's order (`--rope
half_split`), which TorchTitan's rotation misreads. The limit: small random models, one process, fp32.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Titan, convert
from hf_side import KINDS, POSITIONS, VOCABULARY, Kind, logits, loss, save, tokens
from tokenizers import Tokenizer, models, pre_tokenizers

LIMIT = 1e-4  # between two programs in fp32, in logits of up to about 10
FAR = 100 * LIMIT  # what a conversion done wrong has to exceed
PLAIN = "Llama 3, grouped heads"
SCALED = "Llama 3.1, factor 8, bf16"
WIDE = "a head wider than dim / n_heads"
TRAINED = SCALED
OTHERS = {"titan-0.2": ["titan-0.3", "titan-2024"], "titan-0.3": ["titan-0.2", "titan-2024"]}

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Hugging Face folder of each kind."""
    home = tmp_path_factory.mktemp("sources")
    return {
        name: save(kind, home / f"{seed}", seed) for seed, (name, kind) in enumerate(KINDS.items())
    }


@pytest.fixture(scope="session")
def expected(sources: dict[str, Path]) -> dict[str, torch.Tensor]:
    """What transformers makes of each."""
    return {name: logits(folder, tokens()) for name, folder in sources.items()}


@pytest.fixture(scope="session")
def answers(titan: Titan, sources: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """What this release makes of each conversion, right and wrong: logits, or an error. One process."""
    generation, runs = titan.release.generation, []

    def ask(label: str, kind: str, *options: str, dcp: Path | None = None, **changes: Any) -> Path:
        folder = dcp or titan.scratch / f"dcp-{len(runs)}"
        if not dcp:
            convert(sources[kind], folder, "--generation", *options)
        params = KINDS[kind].params() | changes
        runs.append({"name": label, "params": params, "dcp": str(folder)})
        return folder

    for kind in KINDS:
        ask(kind, kind, generation)
        ask(f"{kind}, half_split", kind, generation, "--rope", "half_split")
    ask("three shards", PLAIN, generation, "--shards", "3")
    scaled = next(Path(run["dcp"]) for run in runs if run["name"] == SCALED)
    ask("no scaling", SCALED, dcp=scaled, rope_scaling=None)
    for other in OTHERS[generation]:
        ask(other, PLAIN, other)
    saved, _ = titan.run("logits", {"tokens": tokens().tolist(), "runs": runs}, "logits")
    return saved


def gap(answer: dict[str, Any], expected: torch.Tensor) -> float:
    """The largest difference of two logits. A conversion that did not load has none."""
    assert "error" not in answer, answer["error"]
    return (answer["logits"] - expected).abs().max().item()


def can_say(titan: Titan, kind: Kind) -> bool:
    """0.2.x has no head_dim: it takes dim / n_heads."""
    return titan.release.generation != "titan-0.2" or kind.head_dim * kind.n_heads == kind.dim


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(
    titan: Titan,
    answers: dict[str, dict[str, Any]],
    expected: dict[str, torch.Tensor],
    kind: str,
    record_property: Any,
) -> None:
    if not can_say(titan, KINDS[kind]):
        # The release takes the heads of 0.2.x to be narrower, and so refuses the tensors' shapes.
        assert "size" in answers[kind]["error"].lower(), answers[kind]["error"]
        return
    right = gap(answers[kind], expected[kind])
    wrong = gap(answers[f"{kind}, half_split"], expected[kind])
    print(f"{titan.release.version}, {kind}: {right:.1e}; half_split rows: {wrong:.1f}")
    assert expected[kind].shape[1] == POSITIONS and expected[kind].abs().max() > 1
    assert right <= LIMIT
    assert wrong > FAR, "the control passes, so this test could not have failed"
