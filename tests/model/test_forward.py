"""The reference forward, against transformers."""

from pathlib import Path

import pytest
import torch
from support import checkpoints
from transformers import AutoModelForCausalLM, AutoTokenizer

from llamaconv import sample_path
from llamaconv.model import forward, rope
from llamaconv.model.names import ROLES, every_role, identify
from llamaconv.model.params import LlamaParams
from llamaconv.sample import held_out_text


def weights_of(
    named: dict[str, torch.Tensor],
) -> dict[tuple[str, int | None], torch.Tensor]:
    weights = {}
    for name, weight in named.items():
        known = identify(name, "huggingface")
        assert known is not None
        weights[known[0].name, known[1]] = weight
    return weights


@pytest.mark.parametrize("scaled", [False, True])
def test_logits_are_those_of_transformers_in_both_layouts(tmp_path: Path, scaled: bool) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    folder = checkpoints.write(
        tmp_path / "hf",
        checkpoints.tensors(dtype=torch.float32),
        rope_scaling=scaling if scaled else None,
    )
    tokens = torch.randint(80, (2, 100), generator=torch.Generator().manual_seed(0))
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = reference(tokens).logits
    from llamaconv import open_checkpoint

    params = open_checkpoint(folder).params
    assert params is not None
    weights = weights_of(reference.state_dict())
    found = forward.forward(weights, params, tokens, "half_split")
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-4)
    turned = {
        (name, layer): rope.half_split_to_interleaved(w, getattr(params, heads))
        if (heads := ROLES[name].heads)
        else w
        for (name, layer), w in weights.items()
    }
    found = forward.forward(turned, params, tokens, "interleaved")
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-4)
    assert (forward.forward(weights, params, tokens, "interleaved") - expected).abs().max() > 1


def test_attention_probabilities_sum_to_one_and_look_back_only() -> None:
    params = LlamaParams(16, 2, 2, 1, 8, 24, 20, 1e-5, 10000.0)
    generator = torch.Generator().manual_seed(0)
    weights = {
        (role.name, layer): torch.randn(role.shape(params), generator=generator)
        for role, layer in every_role(params)
    }
    maps: list[torch.Tensor] = []
    forward.forward(weights, params, torch.arange(6)[None], "half_split", maps)
    assert [tuple(m.shape) for m in maps] == [(1, 2, 6, 6)] * 2
    torch.testing.assert_close(maps[0].sum(-1), torch.ones(1, 2, 6))
    assert maps[0].triu(1).abs().max() == 0


def test_the_sample_was_trained_and_its_loss_shows_every_wrong_layout() -> None:
    reference = AutoModelForCausalLM.from_pretrained(sample_path(), dtype=torch.float32)
    tokens = torch.tensor(list(held_out_text())).unflatten(0, (-1, 256))
    with torch.no_grad():
        right = reference(tokens, labels=tokens).loss.item()
        heads = {"q_proj": 8, "k_proj": 2}
        for wrong in ({"q_proj": 8}, {"k_proj": 2}, {"q_proj": 8, "k_proj": 8}, heads):
            bent = AutoModelForCausalLM.from_pretrained(sample_path(), dtype=torch.float32)
            for name, weight in bent.named_parameters():
                if (n := wrong.get(name.split(".")[-2])) is not None:
                    weight.copy_(rope.half_split_to_interleaved(weight, n))
            assert bent(tokens, labels=tokens).loss.item() > right + 1.5
    assert right < 1.6, "nats a byte; an untrained model has 5.5"


def test_the_samples_tokenizer_makes_bytes() -> None:
    tokenizer = AutoTokenizer.from_pretrained(sample_path())
    text = held_out_text()[:600].decode(errors="ignore")
    assert tokenizer(text)["input_ids"] == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
