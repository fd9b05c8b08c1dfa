"""Which Llama it is, from parameters alone."""

import dataclasses

import pytest
from support import checkpoints

from llamaconv.model.families import FAMILIES
from llamaconv.model.names import every_role
from llamaconv.model.params import LlamaParams, RopeScaling
from llamaconv.model.published import PUBLISHED, Published, closest_published, published
from llamaconv.torchtitan.releases import FLAVOURS, STOCK_SCALING

LLAMA_3_8B = LlamaParams(4096, 32, 32, 8, 128, 14336, 128256, 1e-5, 500000.0)
LLAMA_2_7B = LlamaParams(4096, 32, 32, 32, 128, 11008, 32000, 1e-5, 10000.0)
LLAMA_3_70B = LlamaParams(8192, 80, 64, 8, 128, 28672, 128256, 1e-5, 500000.0)


@pytest.mark.parametrize(
    ("params", "names"),
    [
        (LLAMA_3_8B, ("Llama 3 8B",)),
        (dataclasses.replace(LLAMA_3_8B, rope_scaling=STOCK_SCALING), ("Llama 3.1 8B",)),
        (LLAMA_2_7B, ("Llama 2 7B",)),
        (dataclasses.replace(LLAMA_2_7B, norm_eps=1e-6), ("Llama 1 7B",)),
        (
            dataclasses.replace(LLAMA_2_7B, vocab_size=32016, rope_theta=1e6),
            ("Code Llama 7B",),
        ),
        (LLAMA_3_70B, ("Llama 3 70B",)),
        (
            dataclasses.replace(LLAMA_3_70B, rope_scaling=STOCK_SCALING),
            ("Llama 3.1 70B", "Llama 3.3 70B"),
        ),
    ],
)
def test_a_published_model_is_named_and_those_that_are_alike_all(
    params: LlamaParams, names: tuple[str, ...]
) -> None:
    found = closest_published(params)
    assert found.fits
    assert found.names == names
    assert all(name in str(found) for name in names)


def test_a_fine_tuned_model_is_called_by_its_base_and_what_differs() -> None:
    found = closest_published(dataclasses.replace(LLAMA_3_8B, vocab_size=128258))
    assert not found.fits
    assert found.names == ("Llama 3 8B",)
    assert "vocabulary 128258 (published: 128256)" in str(found)


def test_other_factor_of_the_scaling_is_reported() -> None:
    small = LlamaParams(2048, 16, 32, 8, 64, 8192, 128256, 1e-5, 500000.0, STOCK_SCALING, True)
    assert "RoPE scaling 8 " in str(closest_published(small))
    assert closest_published(
        dataclasses.replace(small, rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192))
    ).fits
    assert "head untied (published: tied)" in str(
        closest_published(dataclasses.replace(small, tied=False))
    )


def test_other_sizes_are_not_a_published_llama() -> None:
    found = closest_published(checkpoints.GQA)
    assert not found.names and not found.fits
    assert "Not a published Llama: 12 layers of width 64" in str(found)
    wide = dataclasses.replace(LLAMA_3_8B, head_dim=64)
    assert "Not a published" in str(closest_published(wide)), "heads are part of the sizes"


def test_without_parameters_nothing_is_claimed() -> None:
    found = closest_published(None)
    assert not found.fits
    assert "could not be read" in found._repr_html_()


def test_no_model_of_the_table_is_another_of_it_but_those_known_to_be_alike() -> None:
    values = [dataclasses.replace(one, name="") for one in PUBLISHED]
    twice = [
        one.name for one, value in zip(PUBLISHED, values, strict=True) if values.count(value) > 1
    ]
    assert twice == ["Llama 3.1 70B", "Llama 3.3 70B"]
    assert len({one.name for one in PUBLISHED}) == len(PUBLISHED)
    shown = [
        row
        for family in FAMILIES
        for row in published(dataclasses.replace(LLAMA_3_8B, family=family)).rows
    ]
    assert sorted(row[0] for row in shown) == sorted(one.name for one in PUBLISHED)
    assert all("Llama" in row[0] for row in published().rows)
    assert {flavour.name for flavour in FLAVOURS} >= {"8B", "70B", "405B"}


@pytest.mark.parametrize("one", PUBLISHED, ids=lambda one: one.name)
def test_each_has_about_as_many_parameters_as_its_name_says(one: Published) -> None:
    params, elements = one.params, 0
    for role, _ in every_role(params):
        if not (params.tied and role.name == "output"):
            rows, *columns = role.shape(params)
            elements += rows * (columns[0] if columns else 1)
    said = float(one.name.split()[-1].removesuffix("B")) * 1e9
    assert 0.94 < elements / said < 1.25
