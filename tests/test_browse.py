"""What notebook 1 shows: which Llama, what lies where, index against headers, whatever is wrong."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import checkpoints
import pytest
from test_imports import HEAVY, imported_by

from llamaconv import browse, open_checkpoint
from llamaconv.convert import Conversion
from llamaconv.family import PUBLISHED, which_llama
from llamaconv.panels.browse import tensors
from llamaconv.params import LlamaParams, RopeScaling

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "1-browse-index.ipynb"
INDEX = "model.safetensors.index.json"
LLAMA_31_70B = LlamaParams(
    dim=8192,
    n_layers=80,
    n_heads=64,
    n_kv_heads=8,
    head_dim=128,
    ffn_dim=28672,
    vocab_size=128256,
    norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
)


@pytest.mark.parametrize(
    ("params", "name"),
    [
        (LLAMA_31_70B, "Llama 3.1 or 3.3 70B"),
        (replace(LLAMA_31_70B, rope_scaling=None), "Llama 3 70B"),
        (
            replace(LLAMA_31_70B, rope_scaling=None, vocab_size=32000, rope_theta=1e4),
            "Llama 2 70B",
        ),
        (
            replace(LLAMA_31_70B, rope_theta=1e6),
            "the sizes of Llama 2 70B, with vocabulary 128,256 instead of 32,000",
        ),
        (checkpoints.GQA, "a Llama of its own"),
        (None, "its parameters are not known"),
    ],
)
def test_which_llama_it_is(params: LlamaParams | None, name: str) -> None:
    assert which_llama(params).startswith(name)


def test_no_two_published_llamas_are_alike() -> None:
    assert len({replace_name(one) for one in PUBLISHED}) == len(PUBLISHED)


def replace_name(one: object) -> object:
    return replace(one, name="")  # type: ignore[type-var]


def test_every_byte_is_of_one_kind_and_in_one_file(source: Path) -> None:
    checkpoint = open_checkpoint(source)
    files = browse.files_of(checkpoint)
    assert list(files) == sorted(path.name for path in source.glob("*.safetensors"))
    assert sum(sum(kinds.values()) for kinds in files.values()) == checkpoint.total_bytes
    rows = {row[0]: row for row in browse.by_kind(checkpoint).rows}
    assert list(rows) == list(browse.KINDS)[:-1]
    assert rows["q and k"][1] == 24


@pytest.mark.parametrize("to", ["meta", "dcp"])
def test_other_formats_are_browsed_alike(
    source: Path, convert: Callable[..., Conversion], to: str
) -> None:
    there = open_checkpoint(convert(source, to=to, shards=2, verified=False).target)
    here = open_checkpoint(source)
    assert browse.by_kind(there).rows == browse.by_kind(here).rows
    assert "no index" in browse.index_diff(there).caption
    assert sum(sum(k.values()) for k in browse.files_of(there).values()) >= here.total_bytes


def test_the_table_is_filtered_by_each_condition_and_all_together(source: Path) -> None:
    made = tensors(open_checkpoint(source))
    made.show(interactive=True)
    assert "111 of 111 tensors" in made.output.value
    for name, value, expected in (
        ("kind", "q and k", "24 of 111"),
        ("layer", 3, "2 of 111"),
        ("text", "K_PROJ", "1 of 111"),
        ("file", "model-00001-of-00003.safetensors", "of 111"),
        ("dtype", "bfloat16", "of 111"),
    ):
        made.widgets[name].value = value
        assert expected in made.output.value


def test_names_are_shown_as_text(tmp_path: Path) -> None:
    weights = checkpoints.tensors()
    weights["<img src=x onerror=alert(1)>"] = weights["model.norm.weight"].clone()
    folder = checkpoints.write(tmp_path / "hf", weights)
    html = browse.tensor_table(open_checkpoint(folder), most=200)._repr_html_()
    assert "<img" not in html
    assert "&lt;img src=x onerror" in html


def test_index_and_headers_are_held_against_each_other(source: Path) -> None:
    assert "agree on 111 tensors in 3 files" in browse.index_diff(open_checkpoint(source)).caption

    def edit(index: dict[str, dict[str, object]]) -> None:
        index["metadata"]["total_size"] = 5
        index["weight_map"]["model.norm.weight"] = "model-00001-of-00003.safetensors"
        index["weight_map"]["ghost"] = "model-00001-of-00003.safetensors"
        del index["weight_map"]["lm_head.weight"]

    stored = json.loads((source / INDEX).read_text())["weight_map"]
    checkpoints.edit_json(source / INDEX, edit)
    rows = {row[0]: row[1:] for row in browse.index_diff(open_checkpoint(source)).rows}
    assert rows["ghost"][1] == "in no file that can be read"
    assert rows["lm_head.weight"] == ("nothing", stored["lm_head.weight"])
    assert rows["(all)"][0] == "5 bytes"


def test_a_405b_index_opens_without_torch(tmp_path: Path) -> None:
    script = Path(__file__).with_name("big_folder.py")
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True)
    loaded = imported_by(
        "from llamaconv import browse, open_checkpoint;"
        f"c = open_checkpoint({str(tmp_path)!r});"
        "assert len(c.tensors) == 1137, len(c.tensors);"
        "assert browse.which_llama(c.params).startswith('Llama 3.1 405B'), c.params;"
        "assert len(browse.files_of(c)) == 191; browse.totals(c); browse.index_diff(c);"
        "from llamaconv.panels.browse import tensors"
    )
    assert not loaded & (HEAVY - {"ipywidgets", "IPython"})


def test_a_damaged_folder_is_browsed_headless(source: Path, tmp_path: Path) -> None:
    (source / "model-00002-of-00003.safetensors").unlink()
    command = [sys.executable, "-m", "papermill", str(NOTEBOOK), str(tmp_path / "run.ipynb")]
    command += ["-p", "source", str(source), "--execution-timeout", "120", "--no-progress-bar"]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    assert "it holds 37 tensors" in (tmp_path / "run.ipynb").read_text()
