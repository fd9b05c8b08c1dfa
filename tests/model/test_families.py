"""The table of families: it fits the table of names, and transformers."""

import pytest
from support.checkpoints import CONFIG

from llamaconv.model.config_json import from_config
from llamaconv.model.families import FAMILIES, family_named, family_with
from llamaconv.model.names import GENERATIONS, ROLES


def test_every_extra_role_is_in_the_table_of_names() -> None:
    for family in FAMILIES.values():
        for role in family.extra:
            assert ROLES[role].optional
            assert ROLES[role].names["huggingface"]
        # Some generation of TorchTitan can hold it.
        assert any(all(ROLES[role].names[one] for role in family.roles) for one in GENERATIONS)


def test_a_family_is_found_by_its_name_alone() -> None:
    for name, family in FAMILIES.items():
        assert family_named(name) is family
    for other in ("gemma", "", None, 3, ["llama"], {"llama": 1}):
        assert family_named(other) is None


def test_a_family_is_recognised_by_the_tensors_that_only_it_needs() -> None:
    common = [name for name, role in ROLES.items() if not role.optional]
    for family in FAMILIES.values():
        assert family_with([*common, *family.roles]).roles == family.roles
    # Qwen 2 has no bias of wo.
    biases = ["wq.bias", "wk.bias", "wv.bias"]
    assert family_with([*common, *biases]).model_type == "qwen2"
    assert family_with([*common, *biases, "wo.bias"]).model_type == "llama"
    assert family_with([*common, "w1.bias", "w2.bias", "w3.bias"]).model_type == "llama"


@pytest.mark.parametrize(
    ("model_type", "words"),
    [
        ("gemma", "1 + weight"),
        ("gemma3_text", "sliding windows"),
        ("phi3", "longrope"),
        ("olmo2", "after attention"),
        ("smollm3", "every fourth layer"),
        ("granite", "residuals"),
        ("mixtral", "mixture of experts"),
        ("qwen3_moe", "--checkpoint.initial_load_in_hf"),
        ("llama4_text", "interleaved"),
        ("neither of these", "differ in tensors or in the rotation"),
        (["llama"], "differ in tensors or in the rotation"),
    ],
)
def test_other_families_are_refused_by_name_with_the_reason(model_type: object, words: str) -> None:
    """With Llama's own entries and tensors: for many of them only the name tells."""
    _, problems = from_config({**CONFIG, "model_type": model_type}, {})
    (problem,) = problems
    assert repr(model_type) in problem.message
    assert words in problem.message
    assert all(repr(family) in problem.message for family in FAMILIES)
