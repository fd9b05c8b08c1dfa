"""Each family in TorchTitan 0.3.0: its own adapters, tensor by tensor, and its own models' logits.

The idea: transformers makes a model of each family. llamaconv converts it, and writes a module and a
script. TorchTitan reads both, builds the model and computes what transformers computes; the adapter of
that model, given the same Hugging Face tensors, gives the tensors that llamaconv wrote, to the bit. Next
to each agreement stands the figure of a model with the other RoPE. The limit: 0.3.0 alone, small models,
fp32, a CPU.
"""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import family_models
from titan_advice import Advice, Asked, Key, advised, train
from titan_advice import logits as titan_logits
from titan_env import RELEASES, Titan
from titan_training import write_corpus

from llamaconv.torchtitan import releases
from llamaconv.torchtitan.module import NAME as MODULE

LIMIT = 1e-4  # between two programs in fp32, for logits of up to about 5
FAR = 100 * LIMIT
RIGHT, OTHER_ROPE = "as advised", "with the other RoPE"
NEWEST = RELEASES[-1]

# A model, and the options of the conversion.
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    name: (name, ()) for name in family_models.MODELS
} | {"qwen3, interleaved": ("qwen3", ("--rope", "interleaved"))}
# Their adapters know neither biases nor the other RoPE.
NOT_ADAPTED = {name for name in CASES if "bias" in name or name.startswith("qwen2")}
NOT_ADAPTED |= {"qwen3, interleaved"}
# The stock flavour debugmodel of qwen3, but for its weights.
STOCK = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 3072,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def newest(tmp_path_factory: pytest.TempPathFactory) -> Titan:
    return Titan(NEWEST, NEWEST.make(), tmp_path_factory.mktemp("families"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("sources")
    return {name: family_models.save(name, home / name) for name in family_models.MODELS}


@pytest.fixture(scope="module")
def advice(newest: Titan, folders: dict[str, Path]) -> dict[str, Advice]:
    return {
        case: advised(newest, folders[name], case, *options)
        for case, (name, options) in CASES.items()
    }


@pytest.fixture(scope="module")
def gaps(newest: Titan, folders: dict[str, Path], advice: dict[str, Advice]) -> dict[Key, float]:
    """The largest difference from transformers' logits, right and with the other RoPE."""
    ids = family_models.tokens()
    asked: dict[Key, Asked] = {}
    for case, right in advice.items():
        asked[case, RIGHT] = right, right.dcp, ids
        asked[case, OTHER_ROPE] = with_other_rope(right), right.dcp, ids
    expected = {name: family_models.logits(folder) for name, folder in folders.items()}
    found = {}
    for key, logits in titan_logits(newest, asked).items():
        found[key] = (logits - expected[CASES[key[0]][0]]).abs().max().item()
        print(f"TorchTitan {newest.release.version}, {', '.join(key)}: {found[key]:.1e}")
    return found


def with_other_rope(advice: Advice) -> Advice:
    assert advice.script
    old, new = "ComplexRoPE", "CosSinRoPE"
    if new in advice.module:
        old, new = new, old
    assert old in advice.module
    folder = advice.script.parent
    folder = shutil.copytree(folder, folder.with_name(f"{folder.name}, other RoPE"))
    (folder / MODULE).write_text((folder / MODULE).read_text().replace(old, new))
    return replace(advice, script=folder / advice.script.name)


@pytest.mark.parametrize("case", CASES)
def test_titan_gives_the_logits_of_transformers(gaps: dict[Key, float], case: str) -> None:
    assert gaps[case, RIGHT] <= LIMIT
    assert gaps[case, OTHER_ROPE] > FAR, "either RoPE fits, so this test could not have failed"


@pytest.fixture(scope="module")
def adapted(
    newest: Titan, folders: dict[str, Path], advice: dict[str, Advice]
) -> dict[str, dict[str, list[str]]]:
    runs = []
    for number, (case, right) in enumerate(advice.items()):
        if case not in NOT_ADAPTED:
            tensors = newest.scratch / f"tensors {number}.pt"
            torch.save(load_file(folders[CASES[case][0]] / "model.safetensors"), tensors)
            job = right.job(newest.scratch / f"adapter words {number}", newest.scratch)
            runs.append(job | {"name": case, "dcp": right.dcp, "tensors": str(tensors)})
    found, _ = newest.run("adapter", {"runs": runs}, "adapter", "family_side.py")
    return found


@pytest.mark.parametrize("case", [case for case in CASES if case not in NOT_ADAPTED])
def test_titans_own_adapter_gives_the_same_tensors_both_ways(
    adapted: dict[str, dict[str, list[str]]], case: str
) -> None:
    found = adapted[case]
    assert found["apart"] == []
    assert found["different"] == []
    assert len(found["compared"]) >= 3 + 3 * 9


def test_a_stock_flavour_of_qwen_3_runs_as_the_script_says(newest: Titan, tmp_path: Path) -> None:
    source = family_models.save("qwen3", tmp_path / "stock", **STOCK)
    right = advised(newest, source, "stock")
    assert not right.module
    assert "--module qwen3 --config qwen3_debugmodel" in right.command
    assert "--module qwen3" in right.without_conversion
    found = titan_logits(newest, {("stock",): (right, right.dcp, family_models.tokens())})
    gap = (found[("stock",)] - family_models.logits(source)).abs().max().item()
    print(f"TorchTitan {newest.release.version}, stock debugmodel of qwen3: {gap:.1e}")
    assert gap <= LIMIT
    # And a step of training, from the DCP and from the source as it is.
    corpus = write_corpus(tmp_path)
    for converted in (True, False):
        start = train(newest, right, corpus, f"stock {converted}", converted)
        step = start.step
        scores = family_models.logits(source, step["input"]).flatten(0, 1)
        expected = torch.nn.functional.cross_entropy(scores, step["labels"].flatten()).item()
        print(f"from {'DCP' if converted else 'source'}: {step['loss']:.6f}, {expected:.6f}")
        assert abs(step["loss"] - expected) <= LIMIT


@pytest.mark.parametrize("module", ["llama3", "qwen3"])
def test_flavours_are_those_of_the_release(newest: Titan, module: str) -> None:
    said, _ = newest.run("flavours", {"module": module}, f"flavours {module}", "family_side.py")
    release = releases.RELEASES[0]
    ours = {one.name: one for one in releases.FLAVOURS if one.module == module}
    for name, flavour in ours.items():
        theirs: dict[str, Any] = said[name]
        scaling, rope, chosen = (
            theirs.pop(entry) for entry in ("scaling", "rope", "has_configuration")
        )
        its = flavour.params.to_json()
        assert {entry: its[entry] for entry in theirs} == theirs
        assert (scaling == "llama") == (module in release.scaling)
        assert chosen == (name in release.flavours[module])
        assert rope == {"llama3": "ComplexRoPE", "qwen3": "CosSinRoPE"}[module]
    # What is left are variants of these for tests of TorchTitan.
    assert all(name in ours or "debugmodel" in name for name in said)
