"""The way back: from DCPs of any origin to folders that transformers loads as they are."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import checkpoints
from support.folders import assert_same_folder, tensors_of
from torch.distributed.checkpoint import save
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from llamaconv import (
    RefusedError,
    Target,
    convert_checkpoint,
    make_plan,
    open_checkpoint,
    sample_path,
    verify_checkpoint,
)
from llamaconv.convert.convert import Conversion

Convert = Callable[..., Conversion]


@pytest.mark.parametrize(
    "chain",
    [
        [{"generation": "titan-0.3"}],
        [{"generation": "titan-0.2", "rope": "half_split", "shards": 3}],
        [{"generation": "titan-2024"}, {"to": "dcp", "generation": "titan-0.3", "shards": 5}],
        [
            {"generation": "titan-0.2"},
            {"to": "dcp", "generation": "titan-0.3", "rope": "half_split"},
            {"to": "dcp", "generation": "titan-0.2", "shards": 2},
        ],
    ],
)
def test_a_chain_that_ends_where_it_began_is_equal_to_the_bit(
    source: Path, convert: Convert, chain: list[dict[str, Any]]
) -> None:
    folder = source
    for number, options in enumerate([*chain, {"to": "hf", "max_shard_size": 300_000}]):
        done = convert(folder, name=str(number), **options)
        assert done.verification is not None
        assert done.verification.ok
        scores = next(c for c in done.verification.checks if c.name == "rotated scores")
        assert scores.control is not None
        assert scores.control > 0.1
        folder = done.target
    assert_same_folder(source, folder)
    assert len(list(folder.glob("*.safetensors"))) > 1


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_loads_the_folder_as_it_is(
    tmp_path: Path, convert: Convert, tied: bool
) -> None:
    parameters = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=80,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        rope_parameters=parameters,
        bos_token_id=7,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "hf")
    dcp = convert(tmp_path / "hf", name="dcp").target
    back = convert(dcp, name="back").target
    assert_same_folder(tmp_path / "hf", back)
    again = AutoModelForCausalLM.from_pretrained(back, dtype=torch.float32)
    assert again.config.rope_parameters == config.rope_parameters
    assert again.config.bos_token_id == 7
    assert ("lm_head.weight" in tensors_of(back)) is not tied
    tokens = torch.arange(64)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, model(tokens).logits)


def test_tokenizer_and_generation_config_come_along_through_several_steps(convert: Convert) -> None:
    folder = sample_path()
    for number, to in enumerate(["dcp", "dcp", "hf"]):
        generation = "titan-0.2" if number else "titan-0.3"
        folder = convert(folder, name=str(number), to=to, generation=generation).target
    assert AutoTokenizer.from_pretrained(folder)("abc")["input_ids"] == [97, 98, 99]
    assert (folder / "generation_config.json").is_file()
    assert_same_folder(sample_path(), folder)


def test_a_cast_on_the_way_back(source: Path, convert: Convert) -> None:
    back = convert(convert(source, name="dcp").target, name="back", dtype="float32").target
    found = tensors_of(back)
    for name, weight in checkpoints.tensors().items():
        assert torch.equal(found[name], weight.float())
    assert json.loads((back / "config.json").read_text())["torch_dtype"] == "float32"


class TestWithoutReceipt:
    """What somebody else saved says nothing of heads and of RoPE."""

    @pytest.fixture
    def bare(self, source: Path, convert: Convert, load_dcp: Any, tmp_path: Path) -> Path:
        state = load_dcp(convert(source, verified=False).target)
        save(state, checkpoint_id=tmp_path / "bare", no_dist=True)
        return tmp_path / "bare"

    def test_it_is_refused_until_a_config_is_given(
        self, bare: Path, source: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(RefusedError, match=r"no receipt .* --assets"):
            make_plan(open_checkpoint(bare)).raise_for_errors()
        plan = make_plan(open_checkpoint(bare), Target(assets=str(source)))
        convert_checkpoint(plan, tmp_path / "back")
        assert_same_folder(source, tmp_path / "back")
        assert verify_checkpoint(tmp_path / "back", source=bare).ok

    def test_assets_without_a_config_are_refused(self, bare: Path, tmp_path: Path) -> None:
        with pytest.raises(RefusedError, match=r"--assets needs a folder with config\.json"):
            make_plan(open_checkpoint(bare), Target(assets=str(tmp_path))).raise_for_errors()

    def test_a_config_of_another_model_is_refused(self, bare: Path, tmp_path: Path) -> None:
        other = checkpoints.write(tmp_path / "other", num_key_value_heads=4)
        with pytest.raises(
            RefusedError, match=r"of another model than .*: kv_rows 32, the weights have 16"
        ):
            make_plan(open_checkpoint(bare), Target(assets=str(other))).raise_for_errors()

    def test_a_later_step_beside_our_step_0_needs_nothing(
        self, source: Path, convert: Convert, load_dcp: Any, tmp_path: Path
    ) -> None:
        plan = make_plan(open_checkpoint(source))
        step_0 = convert_checkpoint(plan, tmp_path / "dump", as_step_0=True).target
        state = load_dcp(step_0)
        state["norm.weight"] += 1
        save(
            {**state, "train_state": {"step": 9}},
            checkpoint_id=step_0.with_name("step-9"),
            no_dist=True,
        )
        plan = make_plan(open_checkpoint(step_0.with_name("step-9")))
        assert "the parameters and the layout of" in str(plan.problems[0])
        done = convert_checkpoint(plan, tmp_path / "back")
        expected = checkpoints.tensors()["model.norm.weight"] + 1
        assert torch.equal(tensors_of(done.target)["model.norm.weight"], expected)


def test_a_head_that_was_trained_apart_is_an_error_until_the_user_chooses(
    tmp_path: Path, convert: Convert, load_dcp: Any
) -> None:
    weights = checkpoints.tensors()
    del weights["lm_head.weight"]
    source = checkpoints.write(tmp_path / "hf", weights, tie_word_embeddings=True)
    first = convert(source, name="dcp").target
    state = load_dcp(first)
    state["lm_head.weight"] += 1
    target = tmp_path / "trained"
    save(state, checkpoint_id=target, no_dist=True)
    (target / "llamaconv.json").write_bytes((first / "llamaconv.json").read_bytes())
    with pytest.raises(RefusedError, match="--tie untie"):
        make_plan(open_checkpoint(target)).raise_for_errors()
    back = convert(target, name="back", tie="untie").target
    assert torch.equal(tensors_of(back)["lm_head.weight"], state["lm_head.weight"])
    model = AutoModelForCausalLM.from_pretrained(back)
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
