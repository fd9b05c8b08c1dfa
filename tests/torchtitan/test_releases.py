"""Advice for TorchTitan: a stock flavour only where every parameter is the checkpoint's."""

import ast
from dataclasses import replace
from pathlib import Path

import pytest
from support.llamas import LLAMA_3_8B, LLAMA_31_8B

from llamaconv.model.params import LlamaParams, RopeScaling
from llamaconv.torchtitan import advice as advices
from llamaconv.torchtitan import releases

LLAMA_32_1B = replace(
    LLAMA_31_8B,
    dim=2048,
    n_layers=16,
    head_dim=64,
    ffn_dim=8192,
    tied=True,
    rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192),
)
DCP = Path("/data/my dcp")


def advise(params: LlamaParams, generation: str, **options: object) -> advices.Advice:
    return advices.advise(params, generation, "interleaved", DCP, **options)  # type: ignore[arg-type]


def test_a_model_that_fits_gets_the_stock_flavour_and_the_exact_flags() -> None:
    advice = advise(LLAMA_31_8B, "titan-0.3")
    assert str(advice).startswith("# TorchTitan 0.3.0\ntorchrun ")
    assert advice.flavour == "8B"
    assert advice.command == (
        "torchrun --nproc-per-node 8 -m torchtitan.train --module llama3 --config llama3_8b "
        "--checkpoint.enable --checkpoint.initial_load_path '/data/my dcp'"
    )
    assert not advice.module
    assert "--hf_assets_path DIR" in advice.notes[0]
    assert not advice.warnings
    assert not advice.older
    advice = advise(LLAMA_31_8B, "titan-0.2")
    assert "--model.name llama3 --model.flavor 8B --checkpoint.enable " in advice.command
    assert "trains from random weights" in advice.warnings[0]


def test_the_older_release_that_reads_the_same_names_gets_its_own_flags() -> None:
    (older,) = advise(LLAMA_3_8B, "titan-0.2").older
    assert older.release == "TorchTitan 0.1.0"
    assert older.flavour == "8B"
    assert "--model.flavor 8B --checkpoint.enable_checkpoint --checkpoint.initial" in older.command
    assert "it must have 128256 entries" in older.notes[1]
    (older,) = advise(LLAMA_31_8B, "titan-0.2").older
    assert not older.command
    assert "no RoPE scaling" in older.notes[0]


def test_the_main_branch_is_named_as_the_only_reader_of_its_names() -> None:
    advice = advise(LLAMA_3_8B, "titan-main")
    assert not advice.command and not advice.script
    assert "main branch since 2026-09-21 (#4808, #4815), and by no release yet" in advice.notes[0]
    assert "read and not run" in advice.notes[1]
    assert "in 0.3.0 the factor is 8.0, this model's is none" in advice.notes[2]
    row = releases.fits(LLAMA_31_8B, "interleaved").rows[-1]
    assert row[:2] == ("main", "titan-main") and "no release" in str(row[3])


@pytest.mark.parametrize(
    ("params", "flavours"),
    [
        (LLAMA_31_8B, ["8B", "8B", "none", "not known"]),
        (LLAMA_3_8B, ["none", "none", "8B", "not known"]),
        (LLAMA_32_1B, ["none", "none", "none", "not known"]),
    ],
)
def test_the_table_names_the_flavour_of_each_release(
    params: LlamaParams, flavours: list[str]
) -> None:
    table = releases.fits(params, "interleaved")
    assert [row[0] for row in table.rows] == ["0.3.0", "0.2.2", "0.1.0", "main"]
    assert [row[2] for row in table.rows] == flavours
    assert "none" in {row[2] for row in releases.fits(params, "half_split").rows}


def test_step_0_needs_the_dump_folder_and_no_path() -> None:
    for generation, flag in (("titan-0.3", "--dump_folder"), ("titan-0.2", "--job.dump_folder")):
        advice = advise(LLAMA_31_8B, generation, dump_folder=Path("/dump"))
        assert f"--checkpoint.enable {flag} /dump" in advice.command
        assert not advice.warnings


@pytest.mark.parametrize("generation", ["titan-0.2", "titan-0.3"])
@pytest.mark.parametrize("params", [LLAMA_3_8B, LLAMA_32_1B], ids=["none", "32"])
def test_other_scaling_gets_a_module_and_a_warning(params: LlamaParams, generation: str) -> None:
    advice = advise(params, generation)
    assert advice.flavour == "converted"
    ast.parse(advice.module)
    factor = params.rope_scaling.factor if params.rope_scaling else "none"
    assert f"its RoPE scaling is 8.0, this model's {factor}" in advice.warnings[0]
    if params.rope_scaling:
        assert "32.0" in advice.module
    elif generation == "titan-0.3":
        assert 'scaling="none"' in advice.module
    else:
        assert "scaling_factor=1.0" in advice.module


def test_release_that_cannot_train_the_model_gets_no_command() -> None:
    wide = replace(LLAMA_31_8B, head_dim=256)
    advice = advise(wide, "titan-0.2")
    assert not advice.command
    assert "heads of dim / n_heads only" in advice.notes[0]
    assert advise(wide, "titan-0.3").command
    assert "convert to titan-0.3" in advise(LLAMA_31_8B, "titan-2024").notes[0]


def test_a_tied_head_is_untied_by_0_2() -> None:
    assert any("train apart" in note for note in advise(LLAMA_32_1B, "titan-0.2").notes)
    assert "enable_weight_tying=True" in advise(LLAMA_32_1B, "titan-0.3").module


def test_rows_kept_half_split_need_a_rotate_half_rope() -> None:
    advice = advices.advise(LLAMA_3_8B, "titan-0.3", "half_split", DCP)
    assert "CosSinRoPE.Config(" in advice.module
    for params, generation in ((LLAMA_31_8B, "titan-0.3"), (LLAMA_3_8B, "titan-0.2")):
        advice = advices.advise(params, generation, "half_split", DCP)
        assert not advice.command
        assert "rotate-half" in advice.notes[0]


@pytest.mark.parametrize("ffn_dim", [11, 96, 384, 8192, 14336, 53248])
@pytest.mark.parametrize("dim", [48, 128, 4096, 16384])
def test_the_multiplier_gives_the_width_by_titans_own_formula(dim: int, ffn_dim: int) -> None:
    params = replace(
        LLAMA_3_8B, dim=dim, n_heads=4, n_kv_heads=2, head_dim=dim // 4, ffn_dim=ffn_dim
    )
    module = advise(params, "titan-0.2").module
    multiplier = float(module.split("ffn_dim_multiplier=")[1].split(",")[0])
    # TorchTitan 0.2.2, models/llama3/model/model.py: two thirds of four times dim, multiplied,
    # cut to a whole number, raised to a multiple.
    hidden = int(multiplier * int(2 * 4 * dim / 3))
    assert ffn_dim * ((hidden + ffn_dim - 1) // ffn_dim) == ffn_dim


def test_the_table_says_where_no_conversion_is_needed() -> None:
    why = [row[3] for row in releases.fits(LLAMA_31_8B, "interleaved", True).rows]
    assert ["no conversion is needed" in text for text in why] == [True, True, False, False]
    why = [row[3] for row in releases.fits(LLAMA_31_8B, "interleaved", False).rows]
    assert not any("no conversion" in text for text in why)
    why = [row[3] for row in releases.fits(LLAMA_3_8B, "interleaved", True).rows]
    assert not any("no conversion" in text for text in why)
