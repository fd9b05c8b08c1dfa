"""What is shown of a checkpoint before anything is converted; whole, damaged, and very large."""

import json
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch
from support import checkpoints, headless
from support.imported import imported_by

from llamaconv import open_checkpoint, sample_path
from llamaconv.checkpoint.checkpoint import Checkpoint
from llamaconv.model.names import NAMINGS, every_role
from llamaconv.model.params import LlamaParams
from llamaconv.model.published import closest_published
from llamaconv.notebook import browse, figures
from llamaconv.notebook.panels import browse as panels
from llamaconv.report.tables import Table
from llamaconv.torchtitan.releases import STOCK_SCALING

NOTEBOOK = headless.NOTEBOOKS / "1-browse-index.ipynb"
SECOND = "model-00002-of-00003.safetensors"
EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture
def checkpoint(source: Path) -> Checkpoint:
    return open_checkpoint(source)


def text(shown: Table | browse.Sentence) -> str:
    return str(shown)


def names(table: Table) -> list[str]:
    return [str(row[0]) for row in table.rows]


class TestKinds:
    @pytest.mark.parametrize("naming", NAMINGS)
    def test_every_tensor_of_a_llama_has_a_kind_in_every_naming(self, naming: str) -> None:
        found = set()
        for role, layer in every_role(checkpoints.GQA):
            name = role.in_naming(naming, layer)
            assert name is not None
            found.add(browse.kind_of(name, naming))
        assert found == set(browse.KINDS) - {browse.OTHER}

    @pytest.mark.parametrize(
        ("name", "kind"),
        [
            ("model.layers.3.self_attn.k_proj.weight", "q and k"),
            ("model.layers.3.self_attn.q_proj.bias", "q and k"),
            ("model.layers.3.self_attn.v_proj.weight", "v and o"),
            ("model.layers.3.mlp.down_proj.bias", "feed-forward"),
            ("model.layers.3.input_layernorm.weight", "norms"),
            ("lm_head.weight", "head"),
            ("model.layers.3.self_attn.rotary_emb.inv_freq", browse.OTHER),
            (EVIL, browse.OTHER),
        ],
    )
    def test_the_kind_follows_from_the_role(self, name: str, kind: str) -> None:
        assert browse.kind_of(name, "huggingface") == kind

    def test_without_a_naming_everything_is_other(self) -> None:
        assert browse.kind_of("lm_head.weight", None) == browse.OTHER


def test_totals_add_up_to_the_checkpoint(checkpoint: Checkpoint) -> None:
    *kinds, every = browse.totals(checkpoint).rows
    assert every[0] == "all"
    assert sum(int(str(row[1])) for row in kinds) == int(str(every[1])) == len(checkpoint.tensors)
    elements = [int(str(row[2]).replace(",", "")) for row in (*kinds, every)]
    assert sum(elements[:-1]) == elements[-1] == checkpoint.parameters


def test_bytes_by_file_are_all_bytes(checkpoint: Checkpoint) -> None:
    by_file = browse.bytes_by_file(checkpoint)
    assert len(by_file) == 3
    found = sum(sum(map(sum, kinds.values())) for kinds in by_file.values())
    assert found == checkpoint.total_bytes


def test_tensors_are_sorted_in_the_order_of_a_forward_pass(checkpoint: Checkpoint) -> None:
    table = browse.tensor_table(checkpoint)
    assert names(table)[0] == "model.embed_tokens.weight"
    assert names(table)[-1] == "lm_head.weight"
    assert browse.layers_of(checkpoint) == list(range(12)), "layer 10 does not follow layer 1"


@pytest.mark.parametrize(
    ("filters", "count"),
    [
        ({}, 12 * 9 + 3),
        ({"kind": "q and k"}, 24),
        ({"layer": 11}, 9),
        ({"layer": browse.NO_LAYER}, 3),
        ({"shard": SECOND}, 37),
        ({"dtype": "bfloat16"}, 111),
        ({"dtype": "float32"}, 0),
        ({"text": "MLP down"}, 12),
        ({"text": "layers.1."}, 9),
        ({"kind": "norms", "layer": 0, "text": "input"}, 1),
    ],
)
def test_each_filter_narrows_the_table(
    checkpoint: Checkpoint, filters: dict[str, object], count: int
) -> None:
    table = browse.tensor_table(checkpoint, **filters)  # type: ignore[arg-type]
    assert len(table.rows) == count
    assert table.caption.startswith(f"{count} of 111 tensors")


def test_files_are_sorted_by_number(checkpoint: Checkpoint) -> None:
    tensor = next(iter(checkpoint.tensors.values()))
    piece = tensor.pieces[0]
    names = ["__10_0.distcp", "__2_0.distcp", "__2.distcp", "__2_", "a", "7"]
    pieces = tuple(replace(piece, file=Path(name)) for name in names)
    many = replace(checkpoint, tensors={"x": replace(tensor, pieces=pieces)})
    assert browse.files_of(many) == ["7", "__2.distcp", "__2_", *names[1::-1], "a"]
    assert "6 files, __10_0.distcp first" in str(browse.tensor_table(many))


def test_parameters_are_formatted_for_people(checkpoint: Checkpoint) -> None:
    assert checkpoint.params
    scaled = replace(checkpoint.params, rope_theta=500000.0, rope_scaling=STOCK_SCALING)
    shown = dict(browse.model_table(replace(checkpoint, params=scaled)).rows)  # type: ignore[union-attr]
    assert shown["rope_theta"] == "500000" and shown["norm_eps"] == "1e-05"
    assert shown["rope_scaling"].startswith("factor 8, low_freq_factor 1,")
    assert shown["tied"] == "no"


class TestIndex:
    def test_index_that_agrees_is_reported(self, checkpoint: Checkpoint) -> None:
        assert text(browse.index_diff(checkpoint)).startswith(
            "Index and headers agree: 111 tensors"
        )

    def test_every_difference_is_a_row(self, source: Path) -> None:
        index = source / "model.safetensors.index.json"

        def edit(content: dict[str, object]) -> None:
            entries = content["weight_map"]
            assert isinstance(entries, dict)
            files = sorted(set(entries.values()))
            entries["model.norm.weight"] = next(
                f for f in files if f != entries["model.norm.weight"]
            )
            entries["made.up"] = files[0]
            del entries["lm_head.weight"]
            content["metadata"] = {"total_size": 7}

        checkpoints.edit_json(index, edit)
        found = browse.index_diff(open_checkpoint(source))
        assert isinstance(found, Table)
        rows = {row[0]: row[1:] for row in found.rows}
        assert set(rows) == {"model.norm.weight", "made.up", "lm_head.weight", "total_size"}
        assert rows["made.up"][1] == "in no file"
        assert rows["lm_head.weight"][0] == "nothing"
        assert rows["model.norm.weight"][0] != rows["model.norm.weight"][1]
        assert rows["total_size"][0] == "7 bytes"

    def test_files_that_are_missing_or_outside_the_folder_are_not_opened(
        self, source: Path
    ) -> None:
        (source / SECOND).unlink()
        index = source / "model.safetensors.index.json"
        checkpoints.edit_json(
            index, lambda c: c["weight_map"].update({"a": "../a.safetensors", "b": "x" * 300})
        )
        rows = {
            row[0]: row[2]
            for row in browse.index_diff(open_checkpoint(source)).rows  # type: ignore[union-attr]
        }
        assert rows[SECOND].startswith("not found")
        assert rows["x" * 300].startswith("not found")
        assert "not a bare file name" in rows["../a.safetensors"]

    def test_deleted_folder_is_reported(self, source: Path) -> None:
        checkpoint = open_checkpoint(source)
        source.rename(source.with_name("elsewhere"))
        assert "no longer exists" in text(browse.index_diff(checkpoint))

    def test_invalid_or_missing_index_is_reported(self, source: Path, tmp_path: Path) -> None:
        (source / "model.safetensors.index.json").write_text("<html>")
        assert "cannot be read" in text(browse.index_diff(open_checkpoint(source)))
        single = checkpoints.write(tmp_path / "single", shards=1)
        assert "There is no index" in text(browse.index_diff(open_checkpoint(single)))
        one_file = single / "model.safetensors"
        assert "There is no index" in text(browse.index_diff(open_checkpoint(one_file)))


def test_complete_folder_has_no_problems_and_ignores_nothing(checkpoint: Checkpoint) -> None:
    assert text(browse.problem_table(checkpoint)) == "No problems were found."
    assert "Nothing is ignored" in text(browse.ignored(checkpoint))


def damage(folder: Path) -> Path:
    """A download that went wrong in several ways at once."""
    (folder / SECOND).write_text("<html>please log in</html>")
    (folder / "config.json").write_text("{")
    checkpoints.edit_json(
        folder / "model.safetensors.index.json", lambda c: c["weight_map"].pop("lm_head.weight")
    )
    return folder


def test_damaged_folder_shows_everything_that_can_be_read(source: Path) -> None:
    broken = open_checkpoint(damage(source))
    problems = browse.problem_table(broken)
    assert isinstance(problems, Table)
    assert {str(row[0]) for row in problems.rows} == {"error"}
    assert "this is an HTML page" in str(problems) and "not valid JSON" in str(problems)
    assert str(source) not in str(problems), "the folder's path is the same in every row"
    assert "lm_head.weight" in str(browse.ignored(broken))
    assert "could not be read" in str(browse.model_table(broken))
    assert "could not be read" in str(closest_published(broken.params))
    assert "only what could be read" in figures.shard_strips(broken).alt
    assert len(browse.tensor_table(broken).rows) == len(broken.tensors) == 73


def test_unreadable_folder_shows_empty_tables(source: Path) -> None:
    (source / "model.safetensors.index.json").write_text("")
    empty = open_checkpoint(source)
    assert not empty.tensors
    assert "no tensor" in figures.shard_strips(empty).alt
    assert "0 of 0 tensors" in str(panels.tensors(empty).static())
    assert browse.totals(empty).rows[-1][1] == "0"


@pytest.mark.parametrize("to", ["dcp", "meta"])
def test_meta_and_dcp_are_browsed_like_hugging_face(
    source: Path, convert: Callable[..., object], tmp_path: Path, to: str
) -> None:
    convert(source, to=to, shards=2)
    made = open_checkpoint(tmp_path / "target")
    assert made.format == to
    kinds = {str(row[0]): row[1] for row in browse.totals(made).rows}
    assert kinds["q and k"] == "24" and browse.OTHER not in kinds
    assert len(browse.files_of(made)) >= 1
    assert "111 tensors" in figures.shard_strips(made).alt
    said = text(browse.index_diff(made))
    assert {"meta": "no index", "dcp": ".metadata alone"}[to] in said
    assert browse.tensor_table(made, kind="q and k", layer=3).rows


def test_untrusted_names_are_shown_as_text(tmp_path: Path) -> None:
    weights = {**checkpoints.tensors(), EVIL: torch.zeros(2), "$\\frac$": torch.zeros(2)}
    folder = checkpoints.write(tmp_path / "$x_{$ & co", weights, shards=1)
    (folder / "model.safetensors").rename(folder / "$\\bad{$ 文.safetensors")
    checkpoint = open_checkpoint(folder)
    shown = panels.tensors(checkpoint, most=200)
    for value in (shown.static(), browse.totals(checkpoint), figures.shard_strips(checkpoint)):
        assert "<img src=x" not in value._repr_html_()
    assert "&lt;img src=x" in shown.static()._repr_html_()
    assert "<img" not in browse.Sentence(EVIL)._repr_html_()


class TestPanel:
    def test_the_static_form_shows_the_first_rows(self, checkpoint: Checkpoint) -> None:
        panel = panels.tensors(checkpoint, most=5)
        assert "and 106 more rows" in str(panel.show(interactive=False))
        assert not panel.widgets

    def test_each_control_filters(self, checkpoint: Checkpoint) -> None:
        panel = panels.tensors(checkpoint)
        panel.show(interactive=True)
        assert all(one.description for one in panel.widgets.values())
        for name, value, expected in (
            ("kind", "q and k", "24 of 111"),
            ("layer", 11, "2 of 111"),
            ("text", "k_proj", "1 of 111"),
            ("dtype", "bfloat16", "1 of 111"),
            ("shard", SECOND, "of 111"),
            ("layer", browse.NO_LAYER, "0 of 111"),
        ):
            panel.widgets[name].value = value
            assert expected in panel.output.value

    def test_only_what_occurs_is_offered(self, checkpoint: Checkpoint) -> None:
        offered = {
            name: [value for _, value in control.options]
            for name, control in panels.tensors(checkpoint).controls.items()
            if name != "text"
        }
        assert browse.OTHER not in offered["kind"]
        assert offered["layer"] == [browse.ALL, browse.NO_LAYER, *range(12)]
        assert offered["dtype"] == [browse.ALL, "bfloat16"]


LARGE = LlamaParams(
    *(16384, 126, 128, 8, 128, 53248, 128256, 1e-5, 500000.0), rope_scaling=STOCK_SCALING
)


def write_large(folder: Path, shards: int) -> Path:
    """Llama 3.1 405B in files that have all their bytes and hold none."""
    folder.mkdir()
    tensors = [
        (str(role.in_naming("huggingface", layer)), role.shape(LARGE))
        for role, layer in every_role(LARGE)
    ]
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        header, end = {}, 0
        mine = tensors[number * len(tensors) // shards : (number + 1) * len(tensors) // shards]
        for name, shape in mine:
            begin, end = end, end + 2 * prod(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
            weight_map[name] = file
        text = json.dumps(header).encode()
        with open(folder / file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + end)
    total = sum(2 * prod(shape) for _, shape in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config = checkpoints.CONFIG | {"hidden_size": 16384, "intermediate_size": 53248}
    config |= {"num_attention_heads": 128, "num_hidden_layers": 126, "num_key_value_heads": 8}
    config |= {"vocab_size": 128256, "rope_theta": 500000.0, "rope_scaling": scaling}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_405b_in_191_files_is_opened_compared_named_and_drawn(tmp_path: Path) -> None:
    large = open_checkpoint(write_large(tmp_path / "large", 191))
    assert not large.problems
    assert str(closest_published(large.params)) == "Every parameter is that of Llama 3.1 405B."
    assert "1,137 tensors in 191 files" in text(browse.index_diff(large))
    assert len(browse.files_of(large)) == 191
    alt = figures.shard_strips(large).alt
    assert "191 files" in alt and "812 GB" in alt and "feed-forward 81.3%" in alt


class TestPicture:
    def test_alt_text_states_the_values(self) -> None:
        checkpoint = open_checkpoint(sample_path())
        alt = figures.shard_strips(checkpoint).alt
        shares = {str(row[0]): row[4] for row in browse.totals(checkpoint).rows}
        assert f"feed-forward {shares['feed-forward']}" in alt
        assert "39 tensors in 3 files" in alt

    def test_the_same_checkpoint_gives_the_same_picture(self, checkpoint: Checkpoint) -> None:
        assert figures.shard_strips(checkpoint) == figures.shard_strips(checkpoint)

    def test_single_file_is_drawn(self, tmp_path: Path) -> None:
        single = checkpoints.write(tmp_path / "single", shards=1)
        assert "tensors in 1 file," in figures.shard_strips(open_checkpoint(single)).alt


def test_browsing_a_hugging_face_folder_imports_no_torch() -> None:
    code = """
from llamaconv import open_checkpoint, sample_path
from llamaconv.notebook import browse, figures
from llamaconv.model.published import closest_published, published
from llamaconv.notebook.panels import browse as panels
found = open_checkpoint(sample_path())
figures.shard_strips(found), panels.tensors(found).static(), browse.index_diff(found)
closest_published(found.params), published(), browse.totals(found), browse.problem_table(found)
"""
    assert "torch" not in imported_by(code)


def test_values_without_pictures_import_nothing_heavy() -> None:
    heavy = {"torch", "numpy", "matplotlib", "ipywidgets"}
    assert not imported_by("import llamaconv.notebook.browse, llamaconv.model.published") & heavy


@pytest.mark.thorough
def test_notebook_runs_to_its_end_on_a_damaged_folder(source: Path, tmp_path: Path) -> None:
    done = headless.run(NOTEBOOK.name, tmp_path, f"source={damage(source)}")
    assert done.returncode == 0, done.stderr
    assert "this is an HTML page" in (tmp_path / "run.ipynb").read_text()
