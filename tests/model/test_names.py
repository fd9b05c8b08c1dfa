"""The one table of names."""

import pytest
from support.checkpoints import GQA

from llamaconv.model.names import (
    NAMINGS,
    ROLES,
    best_naming,
    every_role,
    identify,
    trainer_state,
    unwrapped,
    why_needless,
)


def test_every_name_leads_back_to_its_role_in_every_naming() -> None:
    for naming in NAMINGS:
        names = [role.in_naming(naming, layer) for role, layer in every_role(GQA)]
        assert len(set(names)) == len(names) == 3 + 9 * GQA.n_layers
        for (role, layer), name in zip(every_role(GQA), names, strict=True):
            assert name is not None
            assert identify(name, naming) == (role, layer)


LAYER = {
    "attention_norm": ("input_layernorm", "attention_norm", "attention_norm"),
    "wq": ("self_attn.q_proj", "attention.wq", "attention.qkv_linear.wq"),
    "wk": ("self_attn.k_proj", "attention.wk", "attention.qkv_linear.wk"),
    "wv": ("self_attn.v_proj", "attention.wv", "attention.qkv_linear.wv"),
    "wo": ("self_attn.o_proj", "attention.wo", "attention.wo"),
    "ffn_norm": ("post_attention_layernorm", "ffn_norm", "ffn_norm"),
    "w1": ("mlp.gate_proj", "feed_forward.w1", "feed_forward.w1"),
    "w2": ("mlp.down_proj", "feed_forward.w2", "feed_forward.w2"),
    "w3": ("mlp.up_proj", "feed_forward.w3", "feed_forward.w3"),
}
OUTER = {
    "tok_embeddings": ("model.embed_tokens", "tok_embeddings", "tok_embeddings"),
    "norm": ("model.norm", "norm", "norm"),
    "output": ("lm_head", "output", "lm_head"),
}
TORCHTUNE = {
    "tok_embeddings": "tok_embeddings.weight",
    "attention_norm": "layers.{}.sa_norm.scale",
    "wq": "layers.{}.attn.q_proj.weight",
    "wk": "layers.{}.attn.k_proj.weight",
    "wv": "layers.{}.attn.v_proj.weight",
    "wo": "layers.{}.attn.output_proj.weight",
    "ffn_norm": "layers.{}.mlp_norm.scale",
    "w1": "layers.{}.mlp.w1.weight",
    "w2": "layers.{}.mlp.w2.weight",
    "w3": "layers.{}.mlp.w3.weight",
    "norm": "norm.scale",
    "output": "output.weight",
}


def test_the_names_are_those_that_the_formats_use() -> None:
    """Hugging Face's, Meta's and TorchTitan 0.2's, TorchTitan 0.3's, those of 2024, torchtune's."""
    named = {role: [f"{name}.weight" for name in names] for role, names in OUTER.items()}
    for role, (theirs, *others) in LAYER.items():
        named[role] = [f"model.layers.7.{theirs}.weight"]
        named[role] += [f"layers.7.{name}.weight" for name in others]
    for role, (huggingface, older, newer) in named.items():
        layer = 7 if role in LAYER else None
        for naming, name in (
            ("huggingface", huggingface),
            ("meta", older),
            ("titan-0.2", older),
            ("titan-0.3", newer),
            ("titan-2024", f"model.{older}"),
            ("torchtune", TORCHTUNE[role].format(layer)),
        ):
            assert ROLES[role].in_naming(naming, layer) == name
    assert len(named) == 3 + 9


def test_gate_down_and_up_keep_their_places() -> None:
    table = {
        "model.layers.3.mlp.gate_proj.weight": "layers.3.feed_forward.w1.weight",
        "model.layers.3.mlp.down_proj.weight": "layers.3.feed_forward.w2.weight",
        "model.layers.3.mlp.up_proj.weight": "layers.3.feed_forward.w3.weight",
        "model.layers.3.input_layernorm.weight": "layers.3.attention_norm.weight",
        "model.layers.3.post_attention_layernorm.weight": "layers.3.ffn_norm.weight",
    }
    for source, target in table.items():
        known = identify(source, "huggingface")
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
    assert ROLES["wq"].in_naming(naming, 11) == q
    assert ROLES["output"].in_naming(naming, None) == head


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
    assert identify(name, "huggingface") is None


def test_only_q_and_k_are_reordered_each_by_its_own_heads() -> None:
    rotary = {name: role.heads for name, role in ROLES.items() if role.heads}
    assert rotary == {
        "wq": "n_heads",
        "wk": "n_kv_heads",
        "q_norm": 1,
        "k_norm": 1,
        "wq.bias": "n_heads",
        "wk.bias": "n_kv_heads",
    }


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "rope.freqs",
        "freqs_cis",
        "model.freqs_cis",
        "layers.0.attention.wq._extra_state",
    ],
)
def test_names_that_no_model_needs_are_recognised(name: str) -> None:
    assert why_needless(name)
    assert not why_needless(f"{name}.weight")


HF_Q, TITAN_Q = "layers.7.self_attn.q_proj.weight", "layers.7.attention.wq.weight"


@pytest.mark.parametrize(
    ("name", "naming", "added"),
    [
        (f"model.{HF_Q}", "huggingface", ""),
        (f"model.model.{HF_Q}", "huggingface", "model"),
        (f"app.model.model.{HF_Q}", "huggingface", "app model"),
        (f"module._orig_mod.model.{HF_Q}", "huggingface", "module _orig_mod"),
        ("_orig_mod.module.lm_head.weight", "huggingface", "_orig_mod module"),
        (
            "model._fsdp_wrapped_module.model.layers.7._checkpoint_wrapped_module"
            "._fsdp_wrapped_module.self_attn.q_proj.weight",
            "huggingface",
            "_fsdp_wrapped_module _checkpoint_wrapped_module _fsdp_wrapped_module model",
        ),
        (f"base_model.model.model.{HF_Q}", "huggingface", "base_model model"),
        (f"state_dict.model.{TITAN_Q}", "titan-0.2", "state_dict model"),
        (f"model.{TITAN_Q}", "titan-2024", ""),
        ("policy._forward_module.output.weight", "meta", "_forward_module policy"),
    ],
)
def test_wrappers_are_looked_past_and_named(name: str, naming: str, added: str) -> None:
    known, parts = unwrapped(name, naming)
    assert known is not None
    assert known[0].name in ("wq", "output")
    assert parts == tuple(added.split())


@pytest.mark.parametrize(
    "name", ["teacher.lm_head.weight", "lm_head.model.weight", "model.layers.model.7.x", "model"]
)
def test_other_parts_of_names_are_no_wrappers(name: str) -> None:
    assert unwrapped(name, "huggingface") == (None, ())


def test_naming_that_most_names_fit_with_the_fewest_wrappers_is_taken() -> None:
    titan = [str(role.in_naming("titan-0.3", layer)) for role, layer in every_role(GQA)]
    every = ("titan-0.3", "titan-0.2", "titan-2024", "huggingface")
    assert best_naming([*titan, "foo.bar"], every) == "titan-0.3"
    assert best_naming([f"model.{name}" for name in titan], every) == "titan-0.3"
    assert best_naming(["model.tok_embeddings.weight", "model.norm.weight"], every) == "titan-2024"
    assert best_naming(["foo.bar"], every) is None


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("optimizer.state.model.norm.weight.exp_avg", "optimizer"),
        ("optim.param_groups.0.lr", "optim"),
        ("app.optimizers.state.norm.weight.step", "optimizers"),
        ("state.schedulers.LambdaLR.last_epoch", "schedulers"),
        ("optimizer_states.0.x", "optimizer_states"),
        ("dataloader.dp_rank_0", "dataloader"),
        ("rng_state", "rng_state"),
        ("step", "step"),
        ("ema.model.norm.weight", "ema"),
        ("state.norm.weight.exp_avg_sq", "state"),
    ],
)
def test_state_of_a_trainer_is_recognised_by_its_usual_keys(name: str, key: str) -> None:
    assert trainer_state(name) == key


@pytest.mark.parametrize("naming", NAMINGS)
def test_no_tensor_of_a_model_is_taken_for_state_of_a_trainer(naming: str) -> None:
    for role, layer in every_role(GQA):
        name = role.in_naming(naming, layer)
        for front in ("", "model.", "app.model.", "_orig_mod.", "policy."):
            assert not trainer_state(f"{front}{name}")
            assert identify(f"{front}{name}", naming) == (role, layer)
