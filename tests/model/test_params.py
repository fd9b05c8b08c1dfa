"""Parameters from config.json, in both spellings of transformers, never guessed in silence."""

from typing import Any

import pytest
import torch
from support.checkpoints import CONFIG, GQA
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from llamaconv.model.config_json import from_config, to_config
from llamaconv.model.params import LlamaParams, RopeScaling
from llamaconv.model.rope import inverse_frequencies

SCALING = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SHAPES = {"tok_embeddings": (80, 64), "wq": (64, 64), "wk": (16, 64), "w1": (96, 64)}


def read(**changes: Any) -> LlamaParams:
    params, problems = read_all(**changes)
    assert params is not None, problems
    return params


def read_all(shapes: dict[str, tuple[int, ...]] = SHAPES, **changes: Any) -> tuple[Any, list[str]]:
    config = {k: v for k, v in {**CONFIG, **changes}.items() if v is not None}
    params, problems = from_config(config, shapes)
    return params, [str(problem) for problem in problems]


def test_a_config_of_transformers_4() -> None:
    assert read() == GQA


def test_a_config_of_transformers_5_means_the_same() -> None:
    new = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "rope_theta": None}
    assert read(**new) == GQA


def test_scaling_in_both_spellings() -> None:
    expected = RopeScaling(32.0, 1.0, 4.0, 8192)
    assert read(rope_scaling=SCALING).rope_scaling == expected
    assert read(rope_parameters={**SCALING, "rope_theta": 10000.0}).rope_scaling == expected
    old_name = {**SCALING, "type": "llama3"}
    del old_name["rope_type"]
    assert read(rope_scaling=old_name).rope_scaling == expected


@pytest.mark.parametrize("factor", [2.0, 3.7, 4.0])
def test_linear_scaling_is_read_in_both_spellings_and_gives_the_frequencies_of_transformers(
    factor: float,
) -> None:
    scaling = RopeScaling.linear(factor)
    assert read(rope_scaling={"type": "linear", "factor": factor}).rope_scaling == scaling
    new = {"rope_type": "linear", "factor": factor, "rope_theta": 10000.0}
    assert read(rope_parameters=new).rope_scaling == scaling
    written = to_config(read(rope_parameters=new), None)
    assert written["rope_scaling"] == {"rope_type": "linear", "factor": factor}
    expected = LlamaRotaryEmbedding(LlamaConfig(**written)).inv_freq
    assert torch.equal(inverse_frequencies(8, 10000.0, scaling), expected)


def test_what_transformers_writes_today_is_read() -> None:
    parameters = {**SCALING, "rope_theta": 500000.0}
    config = LlamaConfig(hidden_size=96, num_attention_heads=4, rope_parameters=parameters)
    params, problems = from_config(config.to_dict(), {})
    assert not problems
    assert params is not None
    assert params.rope_theta == 500000.0
    assert params.rope_scaling == RopeScaling(32.0, 1.0, 4.0, 8192)
    assert params.head_dim == 24


def test_missing_rope_base_is_transformers_default_with_a_warning() -> None:
    params, problems = read_all(rope_theta=None)
    assert params.rope_theta == 10000.0
    assert len(problems) == 1
    assert "warning" in problems[0]
    assert "500000" in problems[0]


def test_two_bases_that_differ_are_an_error() -> None:
    _, problems = read_all(rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    assert problems[0].startswith("error")
    assert "rope_theta is 10000.0, but rope_parameters has 500000.0" in problems[0]


def test_missing_kv_heads_mean_one_per_query_head() -> None:
    shapes = {**SHAPES, "wq": (64, 64), "wk": (64, 64)}
    assert read_all(shapes, num_key_value_heads=None)[0].n_kv_heads == 8


@pytest.mark.parametrize("n_kv_heads", [1, 2, 8])
def test_mqa_gqa_and_mha(n_kv_heads: int) -> None:
    assert read(num_key_value_heads=n_kv_heads).kv_rows == 8 * n_kv_heads


def test_head_dim_from_the_config_else_from_the_rows_of_q() -> None:
    assert read(head_dim=16).head_dim == 16
    shapes = {**SHAPES, "wq": (128, 64), "wk": (32, 64)}
    params, problems = read_all(shapes)
    assert params.head_dim == 16
    assert params.q_rows == 128
    assert "using 16 from the 128 rows of q" in problems[0]


def test_missing_kv_heads_come_from_the_rows_of_k_with_a_warning() -> None:
    params, problems = read_all(
        {**SHAPES, "wq": (64, 64), "wk": (16, 64)}, num_key_value_heads=None
    )
    assert params.n_kv_heads == 2
    assert "num_key_value_heads is missing; using 2" in problems[0]
    params, problems = read_all(
        {**SHAPES, "wq": (64, 64), "wk": (12, 64)}, num_key_value_heads=None
    )
    assert (params.n_kv_heads, problems) == (8, [])


def test_missing_sizes_come_from_the_tensors_with_a_warning() -> None:
    params, problems = read_all(vocab_size=None, intermediate_size=None)
    assert (params.vocab_size, params.ffn_dim) == (80, 96)
    assert len(problems) == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gpt_neox"}, "model_type 'gpt_neox' is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu' in a Llama; got 'gelu'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config ('fp8')"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "'bits': 4"),
        ({"rope_scaling": {"rope_type": "proportional"}}, "got 'proportional'"),
        ({"rope_scaling": {"type": "linear"}}, "factor must be a positive number; got None"),
        (
            {"rope_scaling": {**SCALING, "factor": None}},
            "factor must be a positive number; got None",
        ),
        ({"rope_scaling": {**SCALING, "high_freq_factor": 1.0}}, "both are 1"),
        ({"rope_scaling": "llama3"}, "rope_scaling must be an object; got 'llama3'"),
        ({"num_key_value_heads": 3}, "8 must be a multiple of num_key_value_heads 3"),
        (
            {"num_attention_heads": None},
            "num_attention_heads must be a positive whole number; it is missing",
        ),
        (
            {"num_hidden_layers": "12"},
            "num_hidden_layers must be a positive whole number; got '12'",
        ),
        ({"num_hidden_layers": True}, "number; got True"),
        ({"hidden_size": -64}, "hidden_size must be a positive whole number; got -64"),
        ({"head_dim": 9}, "head_dim must be even"),
        ({"rope_theta": -1.0}, "rope_theta must be a positive number; got -1.0"),
        ({"rope_theta": float("inf")}, "number; got inf"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a positive number; got nan"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be at most 1024"),
        (
            {"tie_word_embeddings": "false"},
            "tie_word_embeddings must be true or false; got 'false'",
        ),
        (
            {"max_position_embeddings": "long"},
            "max_position_embeddings must be a positive whole number; got 'long'",
        ),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary"),
    ],
)
def test_config_of_another_model_is_an_error_that_names_the_entry(
    changes: dict[str, Any], words: str
) -> None:
    _, problems = read_all(**changes)
    assert any(words in problem and "error" in problem for problem in problems), problems


def test_all_problems_are_found_at_once() -> None:
    _, problems = read_all(rms_norm_eps="small", hidden_act="gelu", rope_theta="x")
    assert len(problems) == 3


def test_json_and_back() -> None:
    params = read(rope_scaling=SCALING)
    assert LlamaParams.from_json(params.to_json()) == params
