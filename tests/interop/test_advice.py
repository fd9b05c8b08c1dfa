"""llamaconv's advice is executed as it is written, and computes what transformers computes.

The idea: no stock flavour fits these models, so `llamaconv convert` writes a module that defines each
and a script that names it. TorchTitan's own code reads both, builds the model, loads the DCP. Beside
each agreement stands the figure for the same weights described wrongly in one place. The limit: small
models, one process, fp32, a CPU. There FlexAttention, which 0.3.0's module asks for, runs uncompiled,
and in training, where it has no backward pass, dense attention under its mask stands in: advice_side.py
does that, and leaves the module's text alone.
"""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_side import LLAMA_3_1, POSITIONS, Kind, logits, loss, save, tokens
from titan_advice import Advice, Asked, Key, Start, advised, train
from titan_advice import logits as titan_logits
from titan_env import Titan, together
from titan_training import write_corpus

from llamaconv.sample import held_out_text, sample_path, write_sample
from llamaconv.torchtitan.module import NAME as MODULE

LIMIT = 1e-4  # between two programs in fp32: for logits of up to 20, and for nats a token
FAR = 100 * LIMIT  # what a wrong description must exceed

# Llama 3.2 in small, with the scaling moved to where 256 positions feel it; and unmoved, to be run at
# eight times as many, in one layer, since uncompiled FlexAttention is slow there.
FACTOR_32 = LLAMA_3_1 | {"factor": 32.0}
LLAMA_3_2 = Kind(
    dim=128,
    head_dim=16,
    rope_scaling=FACTOR_32 | {"original_max_position_embeddings": 64},
    tied=True,
    dtype="bfloat16",
)
ONE_LAYER = replace(LLAMA_3_2, dim=64, n_layers=1, n_heads=4, n_kv_heads=1, rope_scaling=FACTOR_32)
# The stock flavour debugmodel, but for its weights.
STOCK_KIND = Kind(
    dim=256,
    n_layers=6,
    n_heads=16,
    n_kv_heads=16,
    head_dim=16,
    ffn_dim=768,
    rope_scaling=LLAMA_3_1,
    vocabulary=2048,
)
SEED = 32
SAMPLE, SCALED, FAR_OUT, WIDE = "sample", "factor 32", "factor 32 at 2048 positions", "wide"
UNSCALED = (SAMPLE, WIDE)  # no model with a rotate-half RoPE has Llama 3's scaling
INTERLEAVED, HALF_SPLIT = "interleaved", "half_split"
RIGHT, WRONG = "as advised", "described wrongly"

# What says the scaling in the module of either release, and what would say that of a stock flavour.
STOCK_SCALING = {
    "32.0": "8.0",
    "scaling_factor=1.0": "scaling_factor=8.0",
    'scaling="none"': 'scaling="llama"',
}
LOGITS, FROM_PATH, FROM_STEP_0 = "logits", "initial_load_path", "step-0"
STOCK, UNCONVERTED = "stock", "stock, not converted"


@dataclass(frozen=True)
class Model:
    """A Hugging Face folder, the tokens to run, and the logits that transformers gives for them."""

    folder: Path
    ids: torch.Tensor
    logits: torch.Tensor


@pytest.fixture(scope="module")
def models(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    home = tmp_path_factory.mktemp("advised")
    text = torch.tensor(list(held_out_text()[: 2 * POSITIONS])).view(2, POSITIONS)
    given = {
        SAMPLE: (sample_path(), text),
        SCALED: (save(LLAMA_3_2, home / "llama-3.2", seed=SEED), tokens()),
        FAR_OUT: (save(ONE_LAYER, home / "one-layer", seed=SEED), tokens(rows=8).view(1, -1)),
        WIDE: (sources["wide"], tokens()),
    }
    return {name: Model(folder, ids, logits(folder, ids)) for name, (folder, ids) in given.items()}


@pytest.fixture(scope="module")
def advice(titan: Titan, models: dict[str, Model]) -> dict[str, dict[str, Advice]]:
    """What is said of each conversion, by layout of the rows and by model."""
    return {
        rope: {
            name: advised(titan, models[name].folder, f"{rope}, {name}", "--rope", rope)
            for name in names
        }
        for rope, names in ((INTERLEAVED, models), (HALF_SPLIT, UNSCALED))
    }


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(STOCK_KIND, tmp_path_factory.mktemp("stock") / "model", seed=SEED)


@pytest.fixture(scope="module")
def asked(models: dict[str, Model], advice: dict[str, dict[str, Advice]]) -> dict[Key, Asked]:
    """Each conversion in the model that is advised for it, and in one described wrongly.

    Wrong is the stock flavours' scaling, and, for rows kept half_split, the advice for re-ordered ones.
    """
    asked = {}
    for rope, of_this in advice.items():
        for name, right in of_this.items():
            if right.module:
                usual = advice[INTERLEAVED][name]
                wrong = with_stock_scaling(usual) if usual is right else usual
                asked[rope, name, RIGHT] = right, right.dcp, models[name].ids
                asked[rope, name, WRONG] = wrong, right.dcp, models[name].ids
    return asked


def with_stock_scaling(advice: Advice) -> Advice:
    places = [said for said in STOCK_SCALING if said in advice.module]
    assert len(places) == 1 and advice.module.count(places[0]) == 1, advice.module
    assert advice.script
    folder = advice.script.parent
    folder = shutil.copytree(folder, folder.with_name(f"{folder.name}, described wrongly"))
    module = (folder / MODULE).read_text().replace(places[0], STOCK_SCALING[places[0]])
    (folder / MODULE).write_text(module)
    return replace(advice, script=folder / advice.script.name)


@pytest.fixture(scope="module")
def ran(
    titan: Titan,
    models: dict[str, Model],
    advice: dict[str, dict[str, Advice]],
    asked: dict[Key, Asked],
    stock: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """All the logits, and a first training step from each kind of advice that this release has."""
    corpus = write_corpus(tmp_path_factory.mktemp("corpus"))
    begun = {
        FROM_PATH: advice[INTERLEAVED][SCALED],
        FROM_STEP_0: advised(titan, models[SCALED].folder, "dump", "--as-step-0"),
        HALF_SPLIT: advice[HALF_SPLIT][SAMPLE],
        STOCK: advised(titan, stock, "stock"),
    }
    begun[UNCONVERTED] = begun[STOCK]

    def work(name: str) -> Any:
        if name == LOGITS:
            return titan_logits(titan, asked)
        return train(titan, begun[name], corpus, name, converted=name != UNCONVERTED)

    return together(work, [LOGITS, *(name for name in begun if begun[name].command)])


@pytest.fixture(scope="module")
def gaps(titan: Titan, models: dict[str, Model], ran: dict[str, Any]) -> dict[Key, float]:
    """The largest difference from transformers' logits."""
    gaps = {}
    for key, found in ran[LOGITS].items():
        gaps[key] = (found - models[key[1]].logits).abs().max().item()
        print(f"TorchTitan {titan.release.version}, {', '.join(key)}: {gaps[key]:.1e}")
    return gaps


@pytest.mark.parametrize("name", [SAMPLE, SCALED, FAR_OUT])
def test_the_advised_model_gives_the_logits_of_transformers(
    gaps: dict[Key, float], name: str
) -> None:
    assert gaps[INTERLEAVED, name, RIGHT] <= LIMIT
    assert gaps[INTERLEAVED, name, WRONG] > FAR, (
        "the scaling changes nothing, so this shows nothing"
    )


def test_a_wide_head_has_a_model_in_0_3_only(
    titan: Titan, advice: dict[str, dict[str, Advice]], gaps: dict[Key, float]
) -> None:
    if titan.release.generation == "titan-0.2":
        refused(advice[INTERLEAVED][WIDE], "heads of dim / n_heads only")
        return
    assert gaps[INTERLEAVED, WIDE, RIGHT] <= LIMIT
    assert gaps[INTERLEAVED, WIDE, WRONG] > FAR


@pytest.mark.parametrize("name", UNSCALED)
def test_rows_kept_half_split_have_a_rotate_half_model_in_0_3_only(
    titan: Titan,
    advice: dict[str, dict[str, Advice]],
    gaps: dict[Key, float],
    name: str,
) -> None:
    """The second of the two ways with RoPE: the rows stay, and the model turns other pairs."""
    if titan.release.generation == "titan-0.2":
        refused(advice[HALF_SPLIT][name], "heads" if name == WIDE else "rotate-half RoPE")
        return
    assert "CosSinRoPE" in advice[HALF_SPLIT][name].module
    assert gaps[HALF_SPLIT, name, RIGHT] <= LIMIT
    assert gaps[HALF_SPLIT, name, WRONG] > FAR, "a ComplexRoPE model reads these rows as well"


def refused(advice: Advice, why: str) -> None:
    assert (advice.command, advice.module, advice.script) == ("", "", None)
    assert any(why in note for note in advice.notes), advice.notes


@pytest.mark.parametrize("way", [FROM_PATH, FROM_STEP_0])
def test_the_advised_command_starts_at_the_loss_of_transformers(
    titan: Titan, models: dict[str, Model], ran: dict[str, Any], way: str, tmp_path: Path
) -> None:
    stock = LLAMA_3_2.rope_scaling | {"factor": LLAMA_3_1["factor"]}
    wrong = save(replace(LLAMA_3_2, rope_scaling=stock), tmp_path, seed=SEED)
    assert (FROM_PATH in ran[way].advice.command) == (way == FROM_PATH)
    begins_at_the_loss_of(models[SCALED].folder, wrong, titan, ran[way])


def test_the_command_for_rows_kept_half_split_starts_at_the_loss_of_transformers(
    titan: Titan, models: dict[str, Model], ran: dict[str, Any], tmp_path: Path
) -> None:
    if titan.release.generation == "titan-0.2":
        assert HALF_SPLIT not in ran
        return
    wrong = write_sample(tmp_path / "base 500000")
    config = json.loads((wrong / "config.json").read_text())
    (wrong / "config.json").write_text(json.dumps(config | {"rope_theta": 500_000.0}))
    begins_at_the_loss_of(models[SAMPLE].folder, wrong, titan, ran[HALF_SPLIT])


def begins_at_the_loss_of(folder: Path, wrong: Path, titan: Titan, start: Start) -> None:
    """`wrong` has the weights of `folder` and turns its heads otherwise."""
    found, expected, otherwise = (
        start.step["loss"],
        loss(folder, start.step),
        loss(wrong, start.step),
    )
    print(
        f"TorchTitan {titan.release.version}, step 1: loss {found:.6f}, transformers "
        f"{expected:.6f}, with another rotation {otherwise:.6f}"
    )
    assert f"Loading the checkpoint from {start.advice.dcp}" in start.printed
    assert abs(found - expected) <= LIMIT
    assert abs(found - otherwise) > FAR


@pytest.mark.parametrize("name", [STOCK, UNCONVERTED])
def test_stock_flavour_starts_from_the_dcp_and_from_the_hugging_face_folder(
    stock: Path, ran: dict[str, Any], name: str
) -> None:
    start: Start = ran[name]
    place = start.advice.dcp if name == STOCK else stock
    assert start.advice.script
    assert not start.advice.module
    assert f"Loading the checkpoint from {place}" in start.printed
    found, expected = start.step["loss"], loss(stock, start.step)
    print(f"{name}, step 1: loss {found:.6f}, transformers {expected:.6f}")
    assert abs(found - expected) <= LIMIT
