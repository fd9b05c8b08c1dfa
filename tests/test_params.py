"""Parameters from config.json, in both spellings of transformers, never guessed in silence."""

from typing import Any

import pytest
from checkpoints import CONFIG, GQA
from transformers import LlamaConfig

from llamaconv.config import from_config
from llamaconv.params import LlamaParams, RopeScaling

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


def test_what_transformers_writes_today_is_read() -> None:
    parameters = {**SCALING, "rope_theta": 500000.0}
    config = LlamaConfig(hidden_size=96, num_attention_heads=4, rope_parameters=parameters)
    params, problems = from_config(config.to_dict(), {})
    assert not problems
    assert params is not None
    assert params.rope_theta == 500000.0
    assert params.rope_scaling == RopeScaling(32.0, 1.0, 4.0, 8192)
    assert params.head_dim == 24


def test_an_absent_base_is_transformers_default_and_said() -> None:
    params, problems = read_all(rope_theta=None)
    assert params.rope_theta == 10000.0
    assert len(problems) == 1
    assert "warning" in problems[0]
    assert "500000" in problems[0]


def test_two_bases_that_differ_are_an_error() -> None:
    _, problems = read_all(rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    assert problems[0].startswith("error")
    assert "rope_theta is 10000.0 and rope_parameters gives 500000.0" in problems[0]


def test_missing_kv_heads_means_one_a_query_head() -> None:
    assert read(num_key_value_heads=None).n_kv_heads == 8


@pytest.mark.parametrize("n_kv_heads", [1, 2, 8])
def test_mqa_gqa_and_mha(n_kv_heads: int) -> None:
    assert read(num_key_value_heads=n_kv_heads).kv_rows == 8 * n_kv_heads


def test_head_dim_from_the_config_else_from_the_rows_of_q() -> None:
    assert read(head_dim=16).head_dim == 16
    shapes = {**SHAPES, "wq": (128, 64), "wk": (32, 64)}
    params, problems = read_all(shapes)
    assert params.head_dim == 16
    assert params.q_rows == 128
    assert "16 is taken from the 128 rows of q" in problems[0]


def test_sizes_that_are_absent_come_from_the_tensors_and_it_is_said() -> None:
    params, problems = read_all(vocab_size=None, intermediate_size=None)
    assert (params.vocab_size, params.ffn_dim) == (80, 96)
    assert len(problems) == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "qwen3"}, "model_type is 'qwen3'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "scheme 'fp8'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "RoPE type is 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "RoPE type is 'linear'"),
        ({"rope_scaling": {**SCALING, "factor": None}}, "factor is None"),
        ({"rope_scaling": {**SCALING, "high_freq_factor": 1.0}}, "both 1"),
        ({"rope_scaling": "llama3"}, "rope_scaling is 'llama3'; an object"),
        ({"num_key_value_heads": 3}, "8 is not a multiple of num_key_value_heads 3"),
        ({"num_attention_heads": None}, "num_attention_heads is absent"),
        ({"num_hidden_layers": "12"}, "num_hidden_layers is '12'"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"hidden_size": -64}, "hidden_size is -64"),
        ({"head_dim": 9}, "head_dim 9 is odd"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0"),
        ({"rope_theta": float("inf")}, "rope_theta is inf"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"num_hidden_layers": 10**9}, "no Llama has more than 1024"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'"),
        ({"max_position_embeddings": "long"}, "max_position_embeddings is 'long'"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary"),
    ],
)
def test_what_is_no_llama_is_an_error_by_name(changes: dict[str, Any], words: str) -> None:
    _, problems = read_all(**changes)
    assert any(words in problem and "error" in problem for problem in problems), problems


def test_all_problems_are_found_at_once() -> None:
    _, problems = read_all(model_type="gpt2", hidden_act="gelu", rope_theta="x")
    assert len(problems) == 3


def test_json_and_back() -> None:
    params = read(rope_scaling=SCALING)
    assert LlamaParams.from_json(params.to_json()) == params
