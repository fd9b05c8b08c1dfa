"""Models that transformers makes, of each family: to TorchTitan's names and back, with equal logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import checkpoints, family_models, runs
from support.family_models import MODELS

from llamaconv import Target, convert_checkpoint, make_plan, open_checkpoint
from llamaconv.convert.convert import Conversion
from llamaconv.model import forward
from llamaconv.model.names import identify

QWEN3 = [name for name in MODELS if name.startswith("qwen3")]
BIASED = [name for name in MODELS if "bias" in name or name.startswith("qwen2")]


@pytest.mark.parametrize("name", MODELS)
def test_a_family_comes_back_with_its_own_config_and_equal_logits(
    tmp_path: Path, convert: Callable[..., Conversion], name: str
) -> None:
    source = family_models.save(name, tmp_path / "source")
    there = convert(source, "there", shards=2)
    assert there.verification is not None
    assert there.verification.ok
    # Without the source's config.json: what is written follows from parameters and tensors.
    (source / "config.json").rename(tmp_path / "config.json")
    back = convert(there.target, "back")
    (tmp_path / "config.json").rename(source / "config.json")
    assert torch.equal(family_models.logits(source), family_models.logits(back.target))
    written, own = (
        json.loads((folder / "config.json").read_text()) for folder in (back.target, source)
    )
    for entry in ("architectures", "model_type", "tie_word_embeddings"):
        assert written[entry] == own[entry]


# Meta's heads have dim / n_heads rows.
@pytest.mark.parametrize("name", [name for name in MODELS if "head_dim" not in MODELS[name]])
def test_a_family_comes_back_from_metas_files(
    tmp_path: Path, convert: Callable[..., Conversion], name: str
) -> None:
    """Which name no family; the receipt does."""
    source = family_models.save(name, tmp_path / "source")
    there = convert(source, "there", to="meta")
    assert there.verification is not None
    assert there.verification.ok
    back = convert(there.target, "back", to="hf")
    assert torch.equal(family_models.logits(source), family_models.logits(back.target))
    written, own = (
        json.loads((folder / "config.json").read_text()) for folder in (back.target, source)
    )
    assert written["model_type"] == own["model_type"]


@pytest.mark.parametrize("name", MODELS)
def test_the_reference_model_computes_what_transformers_does(tmp_path: Path, name: str) -> None:
    source = family_models.save(name, tmp_path / "source")
    plan = make_plan(open_checkpoint(source))
    params, layout = plan.ready()
    weights = {}
    for stored, tensor in load_file(source / "model.safetensors").items():
        known = identify(stored, "huggingface")
        assert known is not None
        weights[known[0].name, known[1]] = tensor
    weights.setdefault(("output", None), weights["tok_embeddings", None])
    found = forward.forward(weights, params, family_models.tokens(), layout)
    expected = family_models.logits(source)
    assert (found - expected).abs().max() < 1e-4 < 0.01 * expected.abs().max()


@pytest.mark.parametrize("name", QWEN3)
def test_qwen_3_keeps_its_rows_for_torchtitan(
    tmp_path: Path,
    convert: Callable[..., Conversion],
    load_dcp: Callable[[Path], dict[str, torch.Tensor]],
    name: str,
) -> None:
    source = family_models.save(name, tmp_path / "source")
    found = load_dcp(convert(source).target)
    weights = load_file(source / "model.safetensors")
    layer = "model.layers.1.self_attn"
    for own, other in (
        (f"{layer}.q_proj.weight", "layers.1.attention.qkv_linear.wq.weight"),
        (f"{layer}.q_norm.weight", "layers.1.attention.q_norm.weight"),
        (f"{layer}.k_norm.weight", "layers.1.attention.k_norm.weight"),
    ):
        assert torch.equal(weights[own], found[other])
    assert torch.equal(
        found["lm_head.weight"], weights.get("lm_head.weight", found["tok_embeddings.weight"])
    )


def test_interleaved_rows_of_qwen_3_have_their_norms_in_the_same_order(
    tmp_path: Path,
    convert: Callable[..., Conversion],
    load_dcp: Callable[[Path], dict[str, torch.Tensor]],
) -> None:
    source = family_models.save("qwen3", tmp_path / "source")
    done = convert(source, rope="interleaved")
    assert done.verification is not None
    assert done.verification.ok
    weights, found = load_file(source / "model.safetensors"), load_dcp(done.target)
    order = [i // 2 + 8 * (i % 2) for i in range(16)]
    for which in "qk":
        norm = weights[f"model.layers.2.self_attn.{which}_norm.weight"]
        assert torch.equal(found[f"layers.2.attention.{which}_norm.weight"], norm[order])


@pytest.mark.parametrize(
    ("options", "remedy"),
    [({"generation": "titan-0.2"}, "--generation titan-0.3"), ({"to": "meta"}, "--to hf")],
)
def test_norms_within_heads_are_refused_where_no_name_is_known(
    tmp_path: Path, options: dict[str, str], remedy: str
) -> None:
    source = family_models.save("qwen3", tmp_path / "source")
    problems = make_plan(open_checkpoint(source), Target(**options)).errors  # type: ignore[arg-type]
    assert "a Qwen 3 has q_norm and k_norm" in problems[0].message
    assert remedy in problems[0].message


def test_a_dcp_without_a_receipt_shows_its_family_and_layout(
    tmp_path: Path, convert: Callable[..., Conversion]
) -> None:
    """As TorchTitan saves one after training: the assets give the rest."""
    source = family_models.save("qwen3", tmp_path / "source")
    there = convert(source, "there")
    (there.target / "llamaconv.json").unlink()
    assert open_checkpoint(there.target).rope == "half_split"
    back = convert(there.target, "back", assets=str(source))
    assert torch.equal(family_models.logits(source), family_models.logits(back.target))


def test_tensors_of_another_family_are_unknown(tmp_path: Path) -> None:
    source = family_models.save("qwen3", tmp_path / "source")
    entries = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**entries, "model_type": "llama"}))
    plan = make_plan(open_checkpoint(source))
    assert len(plan.unknown) == 2 * 3
    assert any("q_norm" in problem.message for problem in plan.errors)


@pytest.mark.parametrize("name", BIASED)
def test_biases_of_q_and_k_go_with_their_rows(
    tmp_path: Path,
    convert: Callable[..., Conversion],
    load_dcp: Callable[[Path], dict[str, torch.Tensor]],
    name: str,
) -> None:
    source = family_models.save(name, tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    found = load_dcp(convert(source, rope="interleaved").target)
    half = open_checkpoint(source).params.head_dim // 2  # type: ignore[union-attr]
    for own, other in (("q", "wq"), ("k", "wk")):
        bias = weights[f"model.layers.1.self_attn.{own}_proj.bias"].view(-1, 2, half)
        expected = bias.transpose(1, 2).flatten()
        assert torch.equal(found[f"layers.1.attention.qkv_linear.{other}.bias"], expected)
    value = weights["model.layers.1.self_attn.v_proj.bias"]
    assert torch.equal(found["layers.1.attention.qkv_linear.wv.bias"], value)


@pytest.mark.parametrize("name", BIASED)
def test_biases_stay_between_hugging_face_folders(
    tmp_path: Path, convert: Callable[..., Conversion], name: str
) -> None:
    source = family_models.save(name, tmp_path / "source")
    done = convert(source, to="hf", dtype="float16", max_shard_size=50_000)
    there = family_models.logits(done.target)
    assert (there - family_models.logits(source)).abs().max() < 0.05 < there.abs().max()
    assert done.plan.counts["dropped"] == 0


@pytest.mark.parametrize("name", ["qwen2", "llama, biases"])
def test_biases_are_refused_where_no_name_is_known(tmp_path: Path, name: str) -> None:
    source = family_models.save(name, tmp_path / "source")
    for generation in ("titan-0.2", "titan-main"):
        (problem,) = make_plan(open_checkpoint(source), Target(generation=generation)).errors
        assert "--generation titan-0.3" in problem.message


def test_zero_biases_of_a_flag_are_left_out_and_those_of_qwen_2_stay(
    tmp_path: Path, convert: Callable[..., Conversion]
) -> None:
    """A Llama without them is the same model, and a stock flavour; a Qwen 2 has them."""
    for name, count in (("llama, attention biases", 0), ("qwen2", 3 * 3)):
        source = family_models.save(name, tmp_path / f"{name} source")
        weights = load_file(source / "model.safetensors")
        for stored in weights:
            if stored.endswith(".bias"):
                weights[stored].zero_()
        save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
        done = convert(source, f"{name} there")
        assert sum(move.target_name.endswith(".bias") for move in done.plan.written) == count
        back = convert(done.target, f"{name} back")
        assert torch.equal(family_models.logits(source), family_models.logits(back.target))


def test_the_module_gives_biases_to_the_matrices_that_have_them(
    tmp_path: Path, convert: Callable[..., Conversion]
) -> None:
    linears = {
        "qwen2": ["attention.qkv_linear.wqkv"],
        "llama, attention biases": ["attention.qkv_linear.wqkv", "attention.wo"],
    }
    for name, expected in linears.items():
        advice = convert(family_models.save(name, tmp_path / name), f"{name} there").advice
        lines = [line.strip() for line in advice.module.splitlines()]
        assert [f"config.{one}.bias = True" for one in expected] == [
            line for line in lines if line.endswith(".bias = True")
        ]


YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "rope_theta": 1e4,
}
LONGROPE = {
    "rope_type": "longrope",
    "factor": 4.0,
    "short_factor": [1.0] * 8,
    "long_factor": [1.5] * 8,
    "original_max_position_embeddings": 128,
    "rope_theta": 1e4,
}


@pytest.mark.parametrize(
    ("rope", "reason"), [(YARN, "attention factor"), (LONGROPE, "a factor per pair")]
)
def test_other_kinds_of_rope_stay_between_hugging_face_folders_alone(
    tmp_path: Path, convert: Callable[..., Conversion], rope: dict[str, object], reason: str
) -> None:
    source = family_models.save("qwen2", tmp_path / "source", rope_parameters=rope)
    done = convert(source, "cast", to="hf", max_shard_size=50_000)
    assert torch.equal(family_models.logits(source), family_models.logits(done.target))
    kept = json.loads((done.target / "config.json").read_text())["rope_scaling"]
    assert kept == {entry: value for entry, value in rope.items() if entry != "rope_theta"}
    assert done.verification is not None
    assert any("without" in check.detail for check in done.verification.checks)
    for target in (Target(), Target(to="meta")):
        messages = [one.message for one in make_plan(open_checkpoint(source), target).errors]
        assert any(reason in message and "--to hf" in message for message in messages)


def test_removing_the_entry_is_the_remedy_for_yarn(
    tmp_path: Path, convert: Callable[..., Conversion]
) -> None:
    source = family_models.save("qwen2", tmp_path / "source", rope_parameters=YARN)
    plain = family_models.save("qwen2", tmp_path / "plain", rope_parameters={"rope_theta": 1e4})
    there = convert(source, "there", assets=str(plain))
    assert any("the kind of RoPE" in problem.message for problem in there.plan.problems)
    back = convert(there.target, "back")
    assert torch.equal(family_models.logits(plain), family_models.logits(back.target))


def test_dynamic_scaling_is_none_within_the_context_and_comes_back(
    tmp_path: Path, convert: Callable[..., Conversion]
) -> None:
    source = family_models.save("llama, dynamic", tmp_path / "source")
    there = convert(source, "there")
    (warned,) = (one.message for one in there.plan.problems if "dynamic" in one.message)
    assert "512 positions" in warned
    assert 'scaling="none"' in there.advice.module
    back = convert(there.target, "back", assets="")
    entry = json.loads((back.target / "config.json").read_text())["rope_scaling"]
    assert entry == {"rope_type": "dynamic", "factor": 4.0}


WINDOWS = [
    ("mistral", {"sliding_window": 64}),
    ("mistral", {"sliding_window": 4096, "max_position_embeddings": 32768}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}),
]


@pytest.mark.parametrize(("name", "changes"), WINDOWS)
def test_a_sliding_window_below_the_context_stays_between_hugging_face_folders(
    tmp_path: Path, convert: Callable[..., Conversion], name: str, changes: dict[str, object]
) -> None:
    source = family_models.save(name, tmp_path / "source", **changes)
    (problem,) = make_plan(open_checkpoint(source)).errors
    assert f"look back {changes['sliding_window']} tokens only" in problem.message
    done = convert(source, "cast", to="hf", max_shard_size=50_000)
    assert torch.equal(family_models.logits(source), family_models.logits(done.target))
    # The remedy that the message names: the context that is trained is not longer than the window.
    entries = json.loads((source / "config.json").read_text())
    assets = tmp_path / "assets"
    assets.mkdir()
    entries["max_position_embeddings"] = changes["sliding_window"]
    (assets / "config.json").write_text(json.dumps(entries))
    assert not make_plan(open_checkpoint(source), Target(assets=str(assets))).errors


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mistral", {"sliding_window": 512}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 64}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 3}),
    ],
)
def test_a_sliding_window_that_no_layer_has_is_none(
    tmp_path: Path, name: str, changes: dict[str, object]
) -> None:
    source = family_models.save(name, tmp_path / "source", **changes)
    assert not make_plan(open_checkpoint(source)).errors


def test_a_written_config_of_mistral_says_that_there_is_no_window(
    tmp_path: Path, convert: Callable[..., Conversion]
) -> None:
    """transformers takes a missing entry to be 4096."""
    source = family_models.save(
        "mistral", tmp_path / "source", max_position_embeddings=32768, sliding_window=None
    )
    there = convert(source, "there")
    (source / "config.json").unlink()
    back = convert(there.target, "back")
    assert json.loads((back.target / "config.json").read_text())["sliding_window"] is None


def test_a_run_of_qwen_3_moves_with_the_moments_of_its_norms(tmp_path: Path) -> None:
    """What torch's own optimizer has in the other form, in half_split rows as in interleaved ones."""
    params = replace(runs.PARAMS, family="qwen3")
    assets = checkpoints.write_model(tmp_path / "assets", params)
    source = runs.write(tmp_path / "run" / "step-2", runs.state("titan-0.3", params))
    expected = runs.write(tmp_path / "expected", runs.state("titan-main", params))
    options: dict[str, Any] = {"assets": str(assets), "with_optimizer": True}
    main = Target(generation="titan-main", **options)
    done = convert_checkpoint(make_plan(open_checkpoint(source), main), tmp_path / "main")
    assert "optimizer.state.layers.1.attention.k_norm.weight.exp_avg" in runs.entries(done.target)
    runs.assert_same(runs.entries(done.target), runs.entries(expected))
    for number, rope in enumerate(("interleaved", "half_split")):
        folder = tmp_path / f"{number}"
        target = Target(generation="titan-0.3", rope=rope, **options)  # type: ignore[arg-type]
        done = convert_checkpoint(make_plan(open_checkpoint(done.target), target), folder)
    runs.assert_same(runs.entries(done.target), runs.entries(source))


def test_biases_have_no_known_place_in_an_optimizer(tmp_path: Path) -> None:
    params = replace(runs.PARAMS, family="qwen2")
    assets = checkpoints.write_model(tmp_path / "assets", params)
    source = runs.write(tmp_path / "run" / "step-2", runs.state("titan-0.3 split", params))
    target = Target(to="dcp", assets=str(assets), with_optimizer=True, shards=2)
    (problem,) = make_plan(open_checkpoint(source), target).errors
    assert "the model has biases" in problem.message
