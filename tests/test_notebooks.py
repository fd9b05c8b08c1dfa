"""The notebooks headless: parameters through papermill, and what a wrong one gives."""

import ast
import json
import re
from collections.abc import Callable
from pathlib import Path

import checkpoints
import headless
import nbformat
import papermill
import pytest
import torch

from llamaconv import RefusedError, Target, sample_path
from llamaconv.notebook import ConvertChoices as Choices

NOTEBOOKS = headless.NOTEBOOKS
CONVERT = NOTEBOOKS / "4-convert.ipynb"

PROSE_AND_CODE = [
    (path, nbformat.read(path, as_version=4)) for path in sorted(NOTEBOOKS.glob("*.ipynb"))
]


def test_papermill_converts_another_folder_with_other_options(
    tmp_path: Path, load_dcp: Callable[[Path], dict[str, torch.Tensor]]
) -> None:
    source = checkpoints.write(tmp_path / "hf")
    done = headless.run(
        CONVERT.name,
        tmp_path,
        f"source={source}",
        "target=out",
        "generation=titan-0.2",
        "rope=half_split",
        "dtype=float32",
        "shards=2",
    )
    assert done.returncode == 0, done.stderr
    found = load_dcp(tmp_path / "out")
    weights = checkpoints.tensors()
    assert torch.equal(
        found["layers.7.attention.wk.weight"],
        weights["model.layers.7.self_attn.k_proj.weight"].float(),
    )
    receipt = json.loads((tmp_path / "out" / "llamaconv.json").read_text())
    assert receipt["verified"]["ok"]


def test_the_default_target_lies_beside_the_caller_and_may_be_replaced(tmp_path: Path) -> None:
    for _ in range(2):
        assert headless.run(CONVERT.name, tmp_path).returncode == 0
    assert (tmp_path / "converted" / f"{sample_path().name}-titan-0.3" / ".metadata").is_file()


@pytest.mark.parametrize(
    ("parameter", "reason"),
    [
        ("sorce=/data", "unknown parameter 'sorce'; did you mean 'source'?"),
        ("shards=two", "parameter shards is 'two'; int was expected"),
        ("source=/nowhere", "/nowhere: is not there"),
    ],
)
def test_a_wrong_parameter_or_source_fails_with_the_reason_as_the_last_line(
    tmp_path: Path, parameter: str, reason: str
) -> None:
    done = headless.run(CONVERT.name, tmp_path, parameter)
    assert done.returncode != 0
    assert reason in [line for line in done.stderr.splitlines() if line.strip()][-1]
    assert not (tmp_path / "converted").exists()


def namespace(**changes: object) -> dict[str, object]:
    defaults = {**vars(Target()), "source": "", "target": ""}
    defaults["max_shard_size"] = "5GB"
    return {**defaults, "overwrite": False, "interactive": "auto", "In": [""], **changes}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"generation": "titan-9"}, "generation is 'titan-9'; one of titan-0.3"),
        ({"shards": 0}, "shards is 0; a number from 1"),
        ({"max_shard_size": "big"}, "'big' is no size; one like 5GB"),
        ({"shards": True}, "parameter shards is True; int was expected"),
        ({"interactive": "perhaps"}, "interactive is 'perhaps'; one of auto, yes, no"),
        (
            {"In": ["x", "# Parameters\ndtpye = 'keep'\n"]},
            "unknown parameter 'dtpye'; did you mean",
        ),
        ({"In": ["# Parameters\nzzz = 1\n"]}, "unknown parameter 'zzz'. The notebook has source,"),
    ],
)
def test_choices_are_checked_before_anything_else(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(RefusedError, match=re.escape(reason)):
        Choices.of(namespace(**changes))


def test_controls_are_shown_where_a_jupyter_server_stands_behind_the_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    assert not Choices.of(namespace()).wants_controls
    assert Choices.of(namespace(interactive="yes")).wants_controls
    monkeypatch.setenv("JPY_SESSION_NAME", "notebook")
    assert Choices.of(namespace()).wants_controls
    assert not Choices.of(namespace(interactive="no")).wants_controls


def test_the_headless_commands_say_what_was_chosen() -> None:
    choices = Choices.of(namespace(source="/data/my model", dtype="float32", shards=4))
    papermill_command, command = choices.headless("4-convert.ipynb", "convert").splitlines()
    assert "-p source '/data/my model' -p target" in papermill_command
    assert "-p dtype float32 -p shards 4" in papermill_command
    assert "llamaconv convert '/data/my model'" in command
    assert "--dtype float32 --shards 4" in command


def test_a_source_with_problems_stops_before_anything_is_written(tmp_path: Path) -> None:
    source = checkpoints.write(tmp_path / "hf", num_key_value_heads=4, hidden_act="gelu")
    done = headless.run(CONVERT.name, tmp_path, f"source={source}", "target=out")
    assert done.returncode != 0
    for words in ("hidden_act is 'gelu'", "shape [16, 64], [32, 64] expected"):
        assert words in done.stderr
    assert "error: " in [line for line in done.stderr.splitlines() if line.strip()][-1]
    assert not (tmp_path / "out").exists()


def test_every_parameter_can_be_inspected_by_papermill() -> None:
    found = papermill.inspect_notebook(str(CONVERT))
    assert set(found) == {
        *("source", "target", "to", "generation", "rope", "dtype", "shards", "tie"),
        *("max_shard_size", "assets", "overwrite", "interactive"),
    }


@pytest.mark.parametrize(
    ("path", "notebook"), PROSE_AND_CODE, ids=lambda value: getattr(value, "stem", "")
)
def test_the_notebooks_keep_their_form(path: Path, notebook: nbformat.NotebookNode) -> None:
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    prose = [cell for cell in notebook.cells if cell.cell_type == "markdown"]
    assert len(prose) >= len(code)
    assert notebook.metadata.kernelspec.name == "python3"
    assert "widgets" not in notebook.metadata
    for cell in code:
        if "parameters" not in cell.metadata.get("tags", []):
            assert len(cell.source.splitlines()) <= 8
        assert cell.execution_count, (
            "outputs are committed with their counts: run notebooks/make.py"
        )
        assert not [n for n in ast.walk(ast.parse(cell.source)) if isinstance(n, ast.FunctionDef)]
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr"


@pytest.mark.parametrize(
    ("path", "notebook"), PROSE_AND_CODE, ids=lambda value: getattr(value, "stem", "")
)
def test_every_picture_has_words_for_those_who_cannot_see_it(
    path: Path, notebook: nbformat.NotebookNode
) -> None:
    text = nbformat.writes(notebook)
    images = re.findall(r"<img [^>]*>", text)
    assert images
    for image in images:
        assert len(re.search(r'alt=\\"([^"]*)\\"', image)[1]) > 40  # type: ignore[index]
