"""The one table of names."""

import pytest
from checkpoints import GQA

from llamaconv import keys


def test_every_name_leads_back_to_its_role_in_every_naming() -> None:
    for naming in keys.NAMINGS:
        names = [role.in_naming(naming, layer) for role, layer in keys.every(GQA)]
        assert len(set(names)) == len(names) == 3 + 9 * GQA.n_layers
        for (role, layer), name in zip(keys.every(GQA), names, strict=True):
            assert name is not None
            assert keys.identify(name, naming) == (role, layer)


def test_gate_down_and_up_keep_their_places() -> None:
    table = {
        "model.layers.3.mlp.gate_proj.weight": "layers.3.feed_forward.w1.weight",
        "model.layers.3.mlp.down_proj.weight": "layers.3.feed_forward.w2.weight",
        "model.layers.3.mlp.up_proj.weight": "layers.3.feed_forward.w3.weight",
        "model.layers.3.input_layernorm.weight": "layers.3.attention_norm.weight",
        "model.layers.3.post_attention_layernorm.weight": "layers.3.ffn_norm.weight",
    }
    for source, target in table.items():
        known = keys.identify(source, "huggingface")
        assert known is not None
        assert known[0].in_naming("titan-0.3", known[1]) == target


@pytest.mark.parametrize(
    ("naming", "q", "head"),
    [
        ("titan-0.2", "layers.11.attention.wq.weight", "output.weight"),
        ("titan-0.3", "layers.11.attention.qkv_linear.wq.weight", "lm_head.weight"),
        ("titan-2024", "model.layers.11.attention.wq.weight", "model.output.weight"),
        ("huggingface", "model.layers.11.self_attn.q_proj.weight", "lm_head.weight"),
    ],
)
def test_each_generation_has_its_own_names(naming: str, q: str, head: str) -> None:
    assert keys.ROLES["wq"].in_naming(naming, 11) == q
    assert keys.ROLES["output"].in_naming(naming, None) == head


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.01.self_attn.q_proj.weight",
        "model.layers.².self_attn.q_proj.weight",
        "model.layers.N.self_attn.q_proj.weight",
        "model.layers.-1.self_attn.q_proj.weight",
        "layers.1.self_attn.q_proj.weight",
        "model.layers.1.self_attn.q_proj.weight.2",
        "model.1.norm.weight",
        "",
    ],
)
def test_names_that_only_look_alike_are_unknown(name: str) -> None:
    assert keys.identify(name, "huggingface") is None


def test_only_q_and_k_are_reordered_each_by_its_own_heads() -> None:
    rotary = {name: role.heads for name, role in keys.ROLES.items() if role.heads}
    assert rotary == {
        "wq": "n_heads",
        "wk": "n_kv_heads",
        "wq.bias": "n_heads",
        "wk.bias": "n_kv_heads",
    }


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.self_attn.rotary_emb.inv_freq", "rope.freqs", "freqs_cis", "model.freqs_cis"],
)
def test_angles_are_recognised(name: str) -> None:
    assert keys.is_computed(name)
    assert not keys.is_computed(f"{name}.weight")
