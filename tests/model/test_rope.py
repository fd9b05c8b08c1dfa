"""The two layouts and their rotations, against einops and transformers."""

import einops
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from llamaconv.model import rope
from llamaconv.model.params import RopeScaling

H, D, C = 6, 16, 10


@pytest.fixture
def rows() -> torch.Tensor:
    return torch.arange(H * D * C, dtype=torch.float32).view(H * D, C)


def test_half_split_to_interleaved_is_what_einops_says(rows: torch.Tensor) -> None:
    expected = einops.rearrange(rows, "(h two f) c -> (h f two) c", h=H, two=2)
    assert torch.equal(rope.half_split_to_interleaved(rows, H), expected)
    assert not torch.equal(expected, rows)


def test_interleaved_to_half_split_is_what_einops_says(rows: torch.Tensor) -> None:
    expected = einops.rearrange(rows, "(h f two) c -> (h two f) c", h=H, two=2)
    assert torch.equal(rope.interleaved_to_half_split(rows, H), expected)


def test_row_17_of_the_second_head_goes_where_the_definition_says(rows: torch.Tensor) -> None:
    moved = rope.half_split_to_interleaved(rows, H)
    assert torch.equal(moved[D + 2 * 1], rows[D + 1])
    assert torch.equal(moved[D + 2 * 1 + 1], rows[D + 1 + D // 2])


def test_the_way_back_is_the_inverse_and_not_the_same(rows: torch.Tensor) -> None:
    there = rope.half_split_to_interleaved(rows, H)
    assert torch.equal(rope.interleaved_to_half_split(there, H), rows)
    assert not torch.equal(rope.half_split_to_interleaved(there, H), rows)


def test_biases_are_reordered_as_their_rows(rows: torch.Tensor) -> None:
    bias = rows[:, 0].contiguous()
    assert torch.equal(
        rope.half_split_to_interleaved(bias, H), rope.half_split_to_interleaved(rows, H)[:, 0]
    )


@pytest.mark.parametrize("n_heads", [0, 5, 7, H * D])
def test_rows_that_are_not_whole_even_heads_are_an_error(rows: torch.Tensor, n_heads: int) -> None:
    with pytest.raises(ValueError, match=f"{H * D} rows cannot be cut into {n_heads} heads"):
        rope.half_split_to_interleaved(rows, n_heads)


def test_rotate_half_is_transformers_rotation() -> None:
    config = LlamaConfig(hidden_size=H * D, num_attention_heads=H, head_dim=D)
    x_PHD = torch.randn(9, H, D, generator=torch.Generator().manual_seed(0))
    positions_P = torch.tensor([0, 1, 2, 3, 10, 50, 200, 1000, 4000])
    cos, sin = LlamaRotaryEmbedding(config)(x_PHD[None], positions_P[None])
    expected, _ = apply_rotary_pos_emb(
        x_PHD.transpose(0, 1)[None], x_PHD.transpose(0, 1)[None], cos, sin
    )
    theta = config.rope_parameters["rope_theta"]
    angles_PF = rope.angles(positions_P, rope.inverse_frequencies(D, theta))
    found = rope.rotate_half_split(x_PHD, angles_PF)
    torch.testing.assert_close(found, expected[0].transpose(0, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_scaled_frequencies_are_those_of_transformers(factor: float) -> None:
    scaling = RopeScaling(factor, 1.0, 4.0, 8192)
    parameters = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(
        hidden_size=512, num_attention_heads=4, head_dim=128, rope_parameters=parameters
    )
    expected = LlamaRotaryEmbedding(config).inv_freq
    found = rope.inverse_frequencies(128, 500000.0, scaling)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert not torch.allclose(found, rope.inverse_frequencies(128, 500000.0))


def test_rotated_scores_survive_the_change_of_layout_and_only_with_the_matching_rotation() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(n * D, C, generator=generator) for n in (H, 2))
    x = torch.randn(8, C, generator=generator)
    angles_PF = rope.angles(torch.arange(8), rope.inverse_frequencies(D, 10000.0))

    def scores(q: torch.Tensor, k: torch.Tensor, layout: str, rotated: bool = True) -> torch.Tensor:
        q_PHD, k_PGD = ((x @ w.T).view(8, -1, D) for w in (q, k))
        return rope.scores(q_PHD, k_PGD, angles_PF if rotated else None, layout)  # type: ignore[arg-type]

    turned = rope.half_split_to_interleaved(q, H), rope.half_split_to_interleaved(k, 2)
    right = scores(q, k, "half_split")
    torch.testing.assert_close(scores(*turned, "interleaved"), right, atol=1e-4, rtol=0)
    torch.testing.assert_close(
        scores(*turned, "interleaved", False), scores(q, k, "half_split", False)
    )
    wrong = scores(q, k, "interleaved")
    diagonal = torch.eye(8, dtype=torch.bool)
    torch.testing.assert_close(wrong[:, diagonal], right[:, diagonal], atol=1e-4, rtol=0)
    assert (wrong - right)[:, ~diagonal].abs().max() > 1
