"""Plans: every tensor in one class, all problems at once, nothing dropped in silence."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from support import checkpoints
from torch import Tensor

from llamaconv import RefusedError, Target, make_plan, open_checkpoint
from llamaconv.plan.plan import Plan

Q0 = "model.layers.0.self_attn.q_proj.weight"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def plan_of(folder: Path, **options: Any) -> Plan:
    return make_plan(open_checkpoint(folder), Target(**options))


def bent(
    tmp_path: Path, edit: checkpoints.Edit, plan: dict[str, Any] | None = None, **changes: Any
) -> Plan:
    """The plan for a folder whose tensors were edited."""
    weights = checkpoints.tensors()
    edit(weights)
    return plan_of(checkpoints.write(tmp_path / "bent", weights, **changes), **(plan or {}))


def errors(plan: Plan) -> str:
    return "\n".join(map(str, plan.errors))


def operations(plan: Plan) -> Counter[str]:
    return Counter(move.operation for move in plan.moves)


def test_a_plan_moves_every_tensor_and_reorders_q_and_k_only(source: Path) -> None:
    plan = plan_of(source)
    assert not plan.problems
    assert operations(plan) == {"copy": 3 + 7 * 12, "reorder": 2 * 12}
    assert plan.counts == {"moved": 111, "dropped": 0, "unknown": 0, "missing": 0}
    heads = {move.source.split(".")[-2]: move.heads for move in plan.moves if move.heads}
    assert heads == {"q_proj": 8, "k_proj": 2}
    assert plan.bytes_to_read == plan.bytes_to_write == open_checkpoint(source).total_bytes


def test_half_split_keeps_rows_and_warns(source: Path) -> None:
    plan = plan_of(source, rope="half_split")
    assert operations(plan) == {"copy": 111}
    assert not plan.errors
    assert "rotate-half" in str(plan.problems[0])


def test_a_cast_is_a_move_of_its_own_kind(source: Path) -> None:
    plan = plan_of(source, dtype="float32")
    assert operations(plan) == {"cast": 3 + 7 * 12, "reorder": 2 * 12}
    assert plan.bytes_to_write == 2 * plan.bytes_to_read
    reorder = next(move for move in plan.moves if move.operation == "reorder")
    assert "bfloat16 to float32" in reorder.reason


@pytest.mark.parametrize(
    "options",
    [
        {"generation": "titan-9"},
        {"rope": "sideways"},
        {"dtype": "int8"},
        {"shards": 0},
        {"shards": True},
        {"tie": "maybe"},
        {"to": "gguf"},
    ],
)
def test_invalid_target_option_is_refused_with_the_choices(options: dict[str, Any]) -> None:
    with pytest.raises(RefusedError) as caught:
        Target(**options)
    (name, value), *_ = options.items()
    assert str(caught.value).startswith(f"error: {name} must be")
    assert f"got {value!r}" in str(caught.value)


def test_unknown_and_missing_tensors_come_in_one_report(tmp_path: Path) -> None:
    def edit(weights: dict[str, Tensor]) -> None:
        for name in ("model.extra.weight", "vision.weight", "model.layers.0.conv.weight"):
            weights[name] = torch.ones(3)
        del weights[Q0], weights["model.norm.weight"]

    plan = bent(tmp_path, edit)
    text = errors(plan)
    assert len(plan.errors) == 2
    assert "3 tensors do not belong to a Llama" in text
    assert "2 tensors that a Llama of 12 layers needs are missing" in text
    for name in (*plan.unknown, *plan.missing):
        assert name in text
    assert plan.counts == {"moved": 109, "dropped": 0, "unknown": 3, "missing": 2}
    with pytest.raises(RefusedError):
        plan.raise_for_errors()


def test_every_source_tensor_is_in_exactly_one_class(tmp_path: Path) -> None:
    def edit(weights: dict[str, Tensor]) -> None:
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        weights["model.strange"] = torch.ones(4)
        weights["model.layers.1.self_attn.q_proj.bias"] = torch.zeros(64)

    plan = bent(tmp_path, edit)
    counts = plan.counts
    assert counts["moved"] + counts["dropped"] + counts["unknown"] == len(plan.source.tensors)
    assert (counts["dropped"], counts["unknown"]) == (2, 1)


def test_rope_angles_are_dropped_and_listed(tmp_path: Path) -> None:
    name = "model.layers.3.self_attn.rotary_emb.inv_freq"
    plan = bent(tmp_path, lambda weights: weights.update({name: torch.ones(4)}))
    assert not plan.problems
    dropped = [move for move in plan.moves if move.operation == "drop"]
    assert [move.source for move in dropped] == [name]
    assert "computes them itself" in dropped[0].reason


class TestHeads:
    """Shapes that show a wrong number of heads."""

    def test_missing_number_of_kv_heads_is_taken_from_the_rows_of_k(self, tmp_path: Path) -> None:
        plan = bent(tmp_path, lambda weights: None, num_key_value_heads=None)
        assert plan.ready()[0].n_kv_heads == 2
        (problem,) = plan.problems
        assert problem.level == "warning" and "num_key_value_heads" in problem.message

    def test_wrong_number_of_kv_heads_is_one_error(self, tmp_path: Path) -> None:
        (error,) = bent(tmp_path, lambda weights: None, num_key_value_heads=4).errors
        assert "24 tensors" in error.message
        assert "kv_rows is 32 and the weights have 16" in error.message

    def test_vocabulary_of_another_size_names_the_entry(self, tmp_path: Path) -> None:
        (error,) = bent(tmp_path, lambda weights: None, vocab_size=72).errors
        assert "vocab_size is 72 and the weights have 80" in error.message
        assert "different models" not in error.message

    def test_config_of_another_width_is_an_error(self, tmp_path: Path) -> None:
        plan = bent(tmp_path, lambda weights: None, hidden_size=128, head_dim=8)
        assert "different models" in errors(plan)
        assert len(plan.errors) == 1

    def test_layers_beyond_the_config_are_unknown_tensors(self, tmp_path: Path) -> None:
        plan = bent(tmp_path, lambda weights: None, num_hidden_layers=11)
        assert "The parameters say 11 layers" in errors(plan)
        assert plan.counts["unknown"] == 9


class TestOutputHead:
    """Tied, untied, both, and in conflict."""

    def test_tied_head_that_is_not_stored_is_written_from_the_embedding(
        self, tmp_path: Path
    ) -> None:
        plan = bent(tmp_path, lambda weights: weights.pop(HEAD), tie_word_embeddings=True)
        assert not plan.problems
        tie = next(move for move in plan.moves if move.operation == "tie")
        assert (tie.source, tie.target) == (EMBEDDING, HEAD)
        assert "written from it" in tie.reason

    def test_untied_head_that_is_not_stored_is_an_error(self, tmp_path: Path) -> None:
        plan = bent(tmp_path, lambda weights: weights.pop(HEAD))
        assert "lm_head.weight" in errors(plan)
        assert "--tie embedding" in errors(plan)

    def test_untied_head_that_is_not_stored_is_tied_on_request(self, tmp_path: Path) -> None:
        plan = bent(tmp_path, lambda weights: weights.pop(HEAD), plan={"tie": "embedding"})
        assert not plan.problems
        assert operations(plan)["tie"] == 1
        assert plan.params is not None
        assert plan.params.tied

    def test_tied_head_that_equals_the_embedding_is_kept(self, tmp_path: Path) -> None:
        plan = bent(
            tmp_path,
            lambda weights: weights.update({HEAD: weights[EMBEDDING].clone()}),
            tie_word_embeddings=True,
        )
        assert not plan.problems
        assert operations(plan)["tie"] == 0

    def conflict(self, tmp_path: Path, tie: str) -> Plan:
        def edit(weights: dict[str, Tensor]) -> None:
            weights[HEAD] = weights[EMBEDDING].clone()
            weights[HEAD][79, 63] += 1

        return bent(tmp_path, edit, plan={"tie": tie}, tie_word_embeddings=True)

    def test_tied_head_that_differs_is_an_error_until_the_user_chooses(
        self, tmp_path: Path
    ) -> None:
        text = errors(self.conflict(tmp_path, "auto"))
        for way_out in ("--tie embedding", "--tie head", "--tie untie"):
            assert way_out in text

    def test_each_tie_option_drops_what_it_replaces(self, tmp_path: Path) -> None:
        plan = self.conflict(tmp_path / "1", "embedding")
        assert [m.source for m in plan.moves if m.operation == "drop"] == [HEAD]
        assert [m.target for m in plan.moves if m.source == EMBEDDING] == [
            "tok_embeddings.weight",
            HEAD,
        ]
        plan = self.conflict(tmp_path / "2", "head")
        assert [m.source for m in plan.moves if m.operation == "drop"] == [EMBEDDING]
        plan = self.conflict(tmp_path / "3", "untie")
        assert not plan.problems
        assert operations(plan)["drop"] == 0
        assert plan.params is not None
        assert not plan.params.tied


class TestBiases:
    """TorchTitan before 0.3.0 has no place for them."""

    def with_bias(self, tmp_path: Path, bias: Tensor, generation: str = "titan-0.2") -> Plan:
        def edit(weights: dict[str, Tensor]) -> None:
            for layer in range(12):
                weights[f"model.layers.{layer}.self_attn.q_proj.bias"] = bias.clone()

        return bent(tmp_path, edit, {"generation": generation}, attention_bias=True)

    def test_biases_that_are_not_zero_are_one_error_with_their_number(self, tmp_path: Path) -> None:
        plan = self.with_bias(tmp_path, torch.arange(64, dtype=torch.bfloat16))
        (error,) = plan.errors
        assert "12 biases" in error.message
        assert len(error.names) == 12
        assert "--generation titan-0.3 and --to hf" in error.message

    def test_titan_0_3_needs_all_biases_of_a_kind(self, tmp_path: Path) -> None:
        (error,) = self.with_bias(tmp_path, torch.arange(64).bfloat16(), "titan-0.3").errors
        assert "k_proj, v_proj, o_proj lack some" in error.message

    def test_biases_that_are_zero_are_dropped_and_listed(self, tmp_path: Path) -> None:
        plan = self.with_bias(tmp_path, torch.zeros(64))
        assert not plan.problems
        assert operations(plan)["drop"] == 12


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("model.layers.0.self_attn.q_proj.weight_scale_inv", "fp8"),
        ("model.layers.0.self_attn.q_proj.qweight", "GPTQ"),
        ("model.layers.0.self_attn.q_proj.weight.absmax", "bitsandbytes"),
    ],
)
def test_quantised_weights_are_refused_with_the_schemes_name(
    tmp_path: Path, name: str, scheme: str
) -> None:
    plan = bent(tmp_path, lambda weights: weights.update({name: torch.ones(2)}))
    assert scheme in errors(plan)
    assert name in errors(plan)


def test_packed_weights_are_one_error_with_their_tables(tmp_path: Path) -> None:
    """bitsandbytes nf4: the weights are uint8 of other shapes, each with five tensors."""
    tables = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")

    def edit(weights: dict[str, Tensor]) -> None:
        for layer in range(12):
            name = f"model.layers.{layer}.mlp.up_proj.weight"
            weights[name] = torch.zeros(3072, 1, dtype=torch.uint8)
            for table in (*tables, "quant_state.bitsandbytes__nf4"):
                weights[f"{name}.{table}"] = torch.zeros(4)

    (error,) = bent(tmp_path, edit).errors
    assert "12 weights are quantised, scheme bitsandbytes 4 bit" in error.message
    assert "60 tensors" in error.message


@pytest.mark.parametrize(
    ("endings", "scheme"),
    [
        (("qweight", "qzeros", "scales", "g_idx"), "GPTQ"),
        (("qweight", "qzeros", "scales"), "GPTQ or AWQ"),
        (("weight_packed", "weight_scale", "weight_shape"), "compressed-tensors"),
        (("codes", "codebooks", "scales"), "AQLM"),
    ],
)
def test_packed_weights_under_other_names_are_not_missing(
    tmp_path: Path, endings: tuple[str, ...], scheme: str
) -> None:
    def edit(weights: dict[str, Tensor]) -> None:
        for layer in range(12):
            del weights[f"model.layers.{layer}.self_attn.o_proj.weight"]
            for ending in endings:
                weights[f"model.layers.{layer}.self_attn.o_proj.{ending}"] = torch.ones(2)

    (error,) = bent(tmp_path, edit).errors
    assert f"12 weights are quantised, scheme {scheme}:" in error.message


@pytest.mark.parametrize("tables", [True, False])
def test_quantised_weights_that_config_json_states_are_one_error(
    tmp_path: Path, tables: bool
) -> None:
    def edit(weights: dict[str, Tensor]) -> None:
        weights[Q0] = weights[Q0].to(torch.float8_e4m3fn)
        if tables:
            weights[f"{Q0}_scale_inv"] = torch.ones(1, 1)

    (error,) = bent(tmp_path, edit, quantization_config={"quant_method": "fp8"}).errors
    assert "fp8" in error.message


def test_weights_of_mlx_are_named(tmp_path: Path) -> None:
    def edit(weights: dict[str, Tensor]) -> None:
        weights[Q0] = torch.ones(
            64, 8, dtype=torch.int32
        )  # MLX: uint32, which old safetensors cannot save
        weights[Q0.replace("weight", "scales")] = torch.ones(64, 1)
        weights[Q0.replace("weight", "biases")] = torch.ones(64, 1)

    (error,) = bent(tmp_path, edit).errors
    assert "MLX" in error.message


@pytest.mark.parametrize("all_of_them", [True, False])
def test_placeholders_of_zero_3_are_one_error(tmp_path: Path, all_of_them: bool) -> None:
    def edit(weights: dict[str, Tensor]) -> None:
        for name in weights if all_of_them else (EMBEDDING, Q0):
            weights[name] = torch.empty(0, dtype=torch.bfloat16)

    (error,) = bent(tmp_path, edit).errors
    assert f"{111 if all_of_them else 2} of 111 weights are empty" in error.message
    assert "zero_to_fp32.py" in error.message


@pytest.mark.parametrize(
    ("name", "kind", "keeps_head"),
    [
        ("score.weight", "LlamaForSequenceClassification", False),
        ("v_head.summary.weight", "value head", True),
        ("qa_outputs.bias", "LlamaForQuestionAnswering", False),
        ("value_head.weight", "reward or value model", False),
    ],
)
def test_head_of_another_task_is_one_error_with_its_class(
    tmp_path: Path, name: str, kind: str, keeps_head: bool
) -> None:
    def edit(weights: dict[str, Tensor]) -> None:
        weights[name] = torch.ones(1, 64)
        if not keeps_head:
            del weights[HEAD]

    (error,) = bent(tmp_path, edit).errors
    assert name in error.message
    assert kind in error.message
    assert (HEAD in error.message) == (not keeps_head)
    assert "LlamaForCausalLM" in error.message


def test_unknown_prefix_is_one_error_that_names_it(tmp_path: Path) -> None:
    weights = {f"my_model.{name}": weight for name, weight in checkpoints.tensors().items()}
    (error,) = plan_of(checkpoints.write(tmp_path / "bent", weights)).errors
    assert "111 tensors" in error.message
    assert "'my_model.'" in error.message


def test_other_family_by_its_config_is_one_error(tmp_path: Path) -> None:
    def edit(weights: dict[str, Tensor]) -> None:
        weights["model.layers.0.post_feedforward_layernorm.weight"] = torch.ones(8)
        del weights[HEAD]

    (error,) = bent(tmp_path, edit, model_type="olmo2").errors
    assert "olmo2" in error.message


def test_missing_layers_are_counted(tmp_path: Path) -> None:
    (error,) = bent(tmp_path, lambda weights: None, num_hidden_layers=14).errors
    assert "18 tensors" in error.message
    assert "say 14 layers, and the weights have 12" in error.message


def test_float8_weights_are_refused_even_with_a_cast(tmp_path: Path) -> None:
    plan = bent(
        tmp_path,
        lambda weights: weights.update({Q0: weights[Q0].to(torch.float8_e4m3fn)}),
        plan={"dtype": "float32"},
    )
    assert "stored as float8_e4m3fn, a quantised scheme" in errors(plan)


def test_model_saved_without_its_head_class_is_recognised(tmp_path: Path) -> None:
    weights = {n.removeprefix("model."): w for n, w in checkpoints.tensors().items() if n != HEAD}
    plan = plan_of(checkpoints.write(tmp_path / "bare", weights))
    assert "lack 'model.' in front" in errors(plan)
    assert len(plan.errors) == 1


def test_a_plan_of_the_405b_shapes_is_made_without_weights(tmp_path: Path) -> None:
    from dataclasses import replace

    from llamaconv.checkpoint.tensors import TensorInfo
    from llamaconv.model.names import every_role
    from llamaconv.model.params import LlamaParams

    params = LlamaParams(16384, 126, 128, 8, 128, 53248, 128256, 1e-5, 500000.0)
    checkpoint = open_checkpoint(checkpoints.write(tmp_path / "hf"))
    infos = {}
    for role, layer in every_role(params):
        name = role.in_naming("huggingface", layer)
        assert name is not None
        infos[name] = TensorInfo(name, "bfloat16", role.shape(params))
    plan = make_plan(replace(checkpoint, params=params, tensors=infos))
    assert not plan.problems
    assert len(plan.moves) == 1137
    assert 811e9 < plan.bytes_to_write < 812e9


def test_what_is_shown_is_what_is_executed(source: Path, convert: Any) -> None:
    plan = plan_of(source)
    shown = str(plan.table(most=1000))
    done = convert(source)
    assert [one.target for one in done.receipt.tensors] == [move.target for move in plan.moves]
    for entry in done.receipt.tensors:
        assert entry.source in shown
        assert entry.target in shown
