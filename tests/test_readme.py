"""The README's claims that code can check: paths, options, choices, commands."""

import re
from pathlib import Path

import pytest

from llamaconv.cli import main
from llamaconv.keys import GENERATIONS, NAMINGS
from llamaconv.pieces import WEIGHT_DTYPES
from llamaconv.plan import CHOICES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_every_path_exists() -> None:
    paths = re.findall(r"\]\((?!http)([^)]+)\)", README) + re.findall(
        r"notebooks/[\w./-]+\w", README
    )
    assert len(paths) >= 4
    for path in paths:
        assert (ROOT / path).exists(), path


def test_the_options_table_is_that_of_the_code(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("to", "generation", "rope", "dtype", "tie"):
        choices = " \\| ".join(CHOICES[option])
        assert f"`--{option} {choices}`" in README
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    offered = set(re.findall(r"--[a-z0-9-]+", capsys.readouterr().out)) - {
        "--help",
        "--to",
        "--json",
    }
    documented = set(re.findall(r"`(--[a-z0-9-]+)", README)) - {"--json"}
    assert offered <= documented


def test_every_generation_is_named() -> None:
    assert set(GENERATIONS) <= set(NAMINGS)
    for generation in GENERATIONS:
        assert f"`{generation}`" in README


# What holds each row of the table of supported things: a word of the row, and the test of it.
SUPPORTED = {
    "Hugging Face": {
        "shards with or without an index": "test_one_file_no_index_one_of_one_and_several",
        "pytorch_model*.bin": "test_there_and_back",
        "transformers 4 or 5": "test_scaling_in_both_spellings",
        "HuggingFaceStorageWriter": "test_what_torch_writes_for_hugging_face_is_a_source",
        "tokenizer and generation config": "test_tokenizer_and_generation_config_come_along",
    },
    "Hub": {
        "with or without an index": "test_one_file_and_files_without_an_index",
        "with a token": "test_the_token_goes_to_the_hub_and_not_where_it_leads",
        "commit": "test_everything_is_read_at_the_commit_that_was_listed",
        "Other formats": "test_other_formats_are_named_with_the_way_to_them",
    },
    "Meta": {
        "one or several": "test_there_and_back_equal_to_the_bit",
        "original/": "test_to_a_dcp_nothing_is_reordered",
        "by columns": "test_embedding_columns_and_rows_are_told_apart",
    },
    "DCP": {
        "titan-0.3": "test_every_generation",
        "columns": "test_rows_columns_and_both_come_back",
        "fused": "test_fused_qkv_and_names_of_transformers",
        "trainer's state": "test_trainer_state_is_passed_by",
    },
    "attention": {
        "MQA": "test_every_kind_of_attention_equal_to_the_bit",
        "wider": "test_every_chain_ends_with_the_bits",
    },
    "head": {
        "tied and absent": "test_tied_and_absent_is_written_from_the_embedding",
        "tied and stored": "test_tied_and_equal_is_kept",
    },
    "RoPE": {
        "Llama 3 scaling": "test_every_chain_ends_with_the_bits",
        "half_split": "test_half_split_keeps_the_rows",
    },
    "dtype": {"overflows": "test_values_that_overflow_are_an_error"},
    "chunks": {"row chunks": "test_row_chunks_are_those_of_torch_chunk"},
}


def test_every_row_of_what_is_supported_is_held_by_a_test_of_it() -> None:
    table = README.split("## What is supported")[1].split("\n\nAny source")[0]
    rows = dict(re.findall(r"^\| ([\w ]+) \| (.+) \|$", table, re.MULTILINE))
    assert rows.keys() == SUPPORTED.keys()
    tests = "\n".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    for row, held in SUPPORTED.items():
        for words, test in held.items():
            assert words in rows[row], f"{row}: {words}"
            assert f"def {test}" in tests, test
    for dtype in (*WEIGHT_DTYPES, *CHOICES["dtype"][1:]):
        assert dtype in rows["dtype"]


def test_there_are_two_commands_for_all_the_set_up() -> None:
    commands = [line for line in README.splitlines() if line.startswith("pip install")]
    assert len(commands) == 2
