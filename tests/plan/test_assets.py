"""Descriptions of one model that disagree, what a missing config.json leaves open, small files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support import checkpoints
from support.checkpoints import GQA, edit_json
from transformers import AutoConfig

from llamaconv.checkpoint.open import open_checkpoint
from llamaconv.convert.convert import Conversion
from llamaconv.model.params import LlamaParams, RopeScaling
from llamaconv.model.published import PUBLISHED, closest_published, token_ids
from llamaconv.plan.assets import contradictions
from llamaconv.plan.plan import Plan
from llamaconv.plan.planner import make_plan
from llamaconv.plan.target import Target
from llamaconv.verify.verify import verify_checkpoint

Convert = Callable[..., Conversion]
SMALL = replace(GQA, n_layers=2)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return checkpoints.write_model(tmp_path / "model", SMALL, torch_dtype="bfloat16")


def assets(tmp_path: Path, model: Path, **changes: object) -> Path:
    folder = tmp_path / "assets"
    folder.mkdir()
    shutil.copy(model / "config.json", folder)
    edit_json(folder / "config.json", lambda entries: entries.update(changes))
    return folder


def plan_of(folder: Path, to: str = "auto", given: Path | None = None) -> Plan:
    return make_plan(open_checkpoint(folder), Target(to=to, assets=str(given or "")))


def said(plan: Plan, level: str) -> str:
    return "\n".join(str(problem) for problem in plan.problems if problem.level == level)


class TestGivenAssets:
    """A folder given with --assets decides, unless the weights prove it wrong."""

    @pytest.mark.parametrize("to", ["dcp", "hf", "meta"])
    def test_its_entries_decide_in_every_direction_and_differences_are_listed(
        self, tmp_path: Path, model: Path, convert: Convert, to: str
    ) -> None:
        given = assets(
            tmp_path, model, rope_theta=8e6, max_position_embeddings=999, rms_norm_eps=1e-6
        )
        done = convert(model, to=to, assets=str(given))
        assert done.plan.params == replace(SMALL, rope_theta=8e6, max_position=999, norm_eps=1e-6)
        (warned,) = [line for line in said(done.plan, "warning").splitlines() if "rope" in line]
        for words in ("rope_theta 8000000.0, not 10000.0", "999, not 128", "rms_norm_eps", "given"):
            assert words in warned
        assert verify_checkpoint(done.target, source=model).ok
        shutil.rmtree(given)
        assert verify_checkpoint(done.target, source=model).ok

    def test_equal_entries_are_not_worth_a_word(self, tmp_path: Path, model: Path) -> None:
        assert not plan_of(model, given=assets(tmp_path, model)).problems

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"vocab_size": 90}, "vocab_size 90, the weights have 80"),
            ({"num_hidden_layers": 3}, "n_layers 3, the weights have 2"),
            ({"num_attention_heads": 4, "head_dim": 16, "num_key_value_heads": 1}, "n_heads 4"),
            ({"model_type": "gpt_neox", "hidden_act": "gelu"}, "model_type 'gpt_neox'"),
            ({"architectures": ["Qwen2ForCausalLM"], "model_type": None}, "model_type 'qwen2' has"),
            ({"architectures": ["GPTNeoXForCausalLM"], "model_type": None}, "GPTNeoXForCausalLM"),
        ],
    )
    @pytest.mark.parametrize("by", ["model", "receipt"])
    def test_config_of_another_model_is_one_error(
        self,
        tmp_path: Path,
        model: Path,
        convert: Convert,
        changes: dict[str, object],
        words: str,
        by: str,
    ) -> None:
        source = model if by == "model" else convert(model, verified=False).target
        plan = plan_of(source, "hf", given=assets(tmp_path, model, **changes))
        assert len(plan.errors) == 1, plan.errors
        assert words in plan.errors[0].message
        assert str(tmp_path / "assets" / "config.json") in plan.errors[0].message

    def test_it_replaces_a_description_that_is_missing(
        self, tmp_path: Path, model: Path, convert: Convert
    ) -> None:
        given = assets(tmp_path, model)
        meta = convert(model, "meta", to="meta", verified=False).target
        for folder, file in ((meta, "params.json"), (model, "config.json")):
            (folder / "llamaconv.json").unlink(missing_ok=True)
            (folder / file).unlink()
            assert plan_of(folder).errors
            plan = plan_of(folder, given=given)
            assert (plan.params, plan.problems) == (SMALL, ())

    def test_config_in_the_folder_of_a_dcp_is_used_and_checked(
        self, model: Path, convert: Convert
    ) -> None:
        dcp = convert(model, verified=False).target
        (dcp / "llamaconv.json").unlink()
        shutil.copy(model / "config.json", dcp)
        assert plan_of(dcp).params == SMALL
        edit_json(dcp / "config.json", lambda entries: entries.update(vocab_size=99))
        (error,) = plan_of(dcp).errors
        assert "vocab_size 99, the weights have 80" in error.message

    def test_folder_that_is_not_one_is_an_error_with_what_to_pass(
        self, tmp_path: Path, model: Path
    ) -> None:
        for given, words in (
            (tmp_path / "nowhere", "not found"),
            (model / "config.json", f"Pass {model}"),
            (tmp_path, "config.json"),
        ):
            (error,) = plan_of(model, given=given).errors
            assert words in error.message
        (error,) = make_plan(open_checkpoint(model), Target(assets="hf://org/name")).errors
        assert "hf download org/name" in error.message

    def test_tokenizer_that_is_a_pointer_is_an_error(self, tmp_path: Path, model: Path) -> None:
        given = assets(tmp_path, model)
        (given / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n")
        (error,) = plan_of(model, "hf", given).errors
        assert "tokenizer.json" in error.message
        assert "git lfs pull" in error.message


class TestContradictions:
    """The files beside the weights, without anything given."""

    def test_config_json_that_differs_from_the_receipt_decides_with_a_warning(
        self, model: Path, convert: Convert
    ) -> None:
        folder = convert(model, to="hf").target
        edit_json(folder / "config.json", lambda entries: entries.update(rope_theta=5e5))
        plan = plan_of(folder)
        assert plan.params is not None
        assert plan.params.rope_theta == 5e5
        assert "rope_theta 500000.0, not 10000.0" in said(plan, "warning")

    def test_params_json_that_differs_from_the_receipt_decides_with_a_warning(
        self, model: Path, convert: Convert
    ) -> None:
        folder = convert(model, to="meta").target
        edit_json(folder / "params.json", lambda entries: entries.update(rope_theta=5e5))
        plan = plan_of(folder)
        assert plan.params == replace(SMALL, rope_theta=5e5)
        assert "rope_theta 500000.0, not 10000.0" in said(plan, "warning")

    def test_heads_that_differ_from_the_receipt_are_an_error(
        self, model: Path, convert: Convert
    ) -> None:
        folder = convert(model, to="hf").target
        changes = {"num_attention_heads": 4, "head_dim": 16, "num_key_value_heads": 1}
        edit_json(folder / "config.json", lambda entries: entries.update(changes))
        (error,) = contradictions(open_checkpoint(folder))
        assert error.level == "error"
        assert "n_heads 4, not 8" in error.message
        assert [error] == plan_of(folder).errors

    def test_recorded_config_that_changed_since_is_a_warning(
        self, model: Path, convert: Convert
    ) -> None:
        dcp = convert(model).target
        edit_json(model / "config.json", lambda entries: entries.update(rope_theta=5e5))
        plan = plan_of(dcp)
        assert plan.params == SMALL
        assert "rope_theta 10000.0, not 500000.0" in said(plan, "warning")

    def test_recorded_folder_that_is_another_model_by_now_is_not_used(
        self, model: Path, convert: Convert
    ) -> None:
        dcp = convert(model).target
        edit_json(model / "config.json", lambda entries: entries.update(num_hidden_layers=5))
        plan = plan_of(dcp)
        assert not plan.errors
        assert plan.assets is None
        assert "n_layers 5" in said(plan, "warning")

    def test_dtype_that_the_weights_contradict_is_a_warning(self, model: Path) -> None:
        edit_json(model / "config.json", lambda entries: entries.update(torch_dtype="float16"))
        assert "torch_dtype is float16" in said(plan_of(model, "hf"), "warning")
        assert not plan_of(model, "dcp").problems


def test_left_over_quantization_is_a_warning_and_not_written(model: Path, convert: Convert) -> None:
    entries = {
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
        "quantization": {"group_size": 64, "bits": 4},
        "auto_map": {"AutoModelForCausalLM": "modeling_x.X"},
        "bos_token_id": 7,
    }
    edit_json(model / "config.json", lambda config: config.update(entries))
    done = convert(model, to="hf")
    (left_over,) = [one for one in done.plan.problems if "left over" in one.message]
    assert "quantization_config ('bitsandbytes')" in left_over.message
    assert "quantization ({" in left_over.message
    assert "auto_map" in said(done.plan, "warning")
    written = json.loads((done.target / "config.json").read_text())
    assert written.keys().isdisjoint({*entries} - {"bos_token_id"})
    assert written["bos_token_id"] == 7


class TestWithoutConfig:
    """Meta's files say less than config.json: it is filled in, or named."""

    def test_what_is_not_known_is_named_and_not_assumed(
        self, model: Path, convert: Convert, tmp_path: Path
    ) -> None:
        meta = convert(model, "meta", to="meta").target
        (meta / "llamaconv.json").unlink()
        done = convert(meta, "back", to="hf")
        text = said(done.plan, "warning")
        for entry in ("max_position_embeddings", "bos_token_id", "eos_token_id"):
            assert entry in text
        config = AutoConfig.from_pretrained(done.target)
        assert (config.bos_token_id, config.eos_token_id) == (None, None)

    def test_what_the_receipt_knows_is_written(self, model: Path, convert: Convert) -> None:
        meta = convert(model, "meta", to="meta").target
        done = convert(meta, "back", to="hf")
        assert AutoConfig.from_pretrained(done.target).max_position_embeddings == 128

    @pytest.mark.parametrize(
        ("name", "positions", "tokens"),
        [
            ("Llama 1 7B", 2048, (1, 2)),
            ("Llama 2 7B", 4096, (1, 2)),
            ("Code Llama 13B", 16384, (1, 2)),
            ("Llama 3 8B", 8192, (128000, 128001)),
            ("Llama 3.1 70B", 131072, (128000, 128001)),
            ("Llama 3.2 1B", 131072, (128000, 128001)),
        ],
    )
    def test_published_models_are_known(
        self, name: str, positions: int, tokens: tuple[int, int]
    ) -> None:
        one = next(one for one in PUBLISHED if one.name == name)
        params = LlamaParams(
            *(one.dim, one.n_layers, one.n_heads, one.n_kv_heads, one.dim // one.n_heads),
            *(one.ffn_dim, one.vocab_size, one.norm_eps or 1e-5, one.rope_theta),
            *(one.rope_scaling, one.tied),
        )
        assert closest_published(params).max_position == positions
        assert tuple(token_ids(params.vocab_size).values()) == tokens
        other = replace(params, rope_scaling=RopeScaling.linear(2.0))
        assert closest_published(other).max_position is None


class TestSmallFiles:
    """Every small file comes along, or is named."""

    FILES = (
        *("tokenizer.model", "tekken.json", "tokenizer.json", "tokenizer_config.json"),
        *("chat_template.json", "additional_chat_templates/rag.jinja", "LICENSE.txt"),
        *("USE_POLICY.md", "generation_config.json", "preprocessor_config.json"),
    )

    def fill(self, folder: Path) -> None:
        for name in self.FILES:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(name)
        (folder / "modeling_own.py").write_text("")

    def there(self, folder: Path) -> list[str]:
        return [name for name in self.FILES if (folder / name).is_file()]

    def test_they_travel_to_every_format_with_a_place_and_back(
        self, model: Path, convert: Convert
    ) -> None:
        self.fill(model)
        done = convert(model, "meta", to="meta", verified=False)
        assert self.there(done.target) == list(self.FILES)
        assert "modeling_own.py" in said(done.plan, "warning")
        shutil.rmtree(model)
        dcp = convert(done.target, "dcp", verified=False)
        assert not self.there(dcp.target)
        assert any("tokenizer.model" in note for note in dcp.advice.notes)
        back = convert(dcp.target, "back", verified=False)
        assert self.there(back.target) == list(self.FILES)

    def test_files_that_cannot_be_read_for_one_reason_are_one_error(self, model: Path) -> None:
        for name in ("tokenizer.json", "tokenizer.model", "LICENSE"):
            (model / name).symlink_to(model / name)
        wrong = said(plan_of(model, "meta"), "error")
        assert "\n" not in wrong
        assert "tokenizer.json" in wrong and "tokenizer.model" in wrong
        assert wrong.endswith("symbolic links. Make them readable, or move them away")

    def test_tokenizer_in_the_folder_of_metas_files_is_found(
        self, model: Path, convert: Convert, tmp_path: Path
    ) -> None:
        repository = tmp_path / "repository"
        convert(model, "repository", to="meta", verified=False).target.rename(tmp_path / "own")
        repository.mkdir()
        (tmp_path / "own").rename(repository / "original")
        (repository / "original" / "llamaconv.json").unlink()
        (repository / "original" / "tokenizer.model").write_bytes(b"x")
        (repository / "LICENSE").write_text("x")
        done = convert(repository, "back", to="hf", verified=False)
        assert sorted(done.plan.small_files) == ["LICENSE", "tokenizer.model"]

    def test_folder_without_tokenizer_is_named(self, model: Path, convert: Convert) -> None:
        meta = convert(model, "meta", to="meta", verified=False).target
        assert "no tokenizer" in said(plan_of(meta, "hf"), "warning")


def test_factor_of_config_json_beside_metas_files_is_used(tmp_path: Path, convert: Convert) -> None:
    scaling = RopeScaling(8.0, 1.0, 4.0, 8192)
    folder = checkpoints.write_model(tmp_path / "model", replace(SMALL, rope_scaling=scaling))
    meta = convert(folder, "meta", to="meta", verified=False).target
    (meta / "llamaconv.json").unlink()
    shutil.copy(folder / "config.json", meta)
    edit_json(meta / "config.json", lambda entries: entries["rope_scaling"].update(factor=16.0))
    for to in ("dcp", "hf"):
        params = plan_of(meta, to).params
        assert params is not None
        assert params.rope_scaling == replace(scaling, factor=16.0)
