"""The notebooks headless: parameters through papermill, and what a wrong one gives."""

import ast
import json
import re
from collections.abc import Callable
from pathlib import Path

import nbformat
import papermill
import pytest
import torch
from support import checkpoints, headless

from llamaconv import RefusedError, Target, sample_path
from llamaconv.notebook.parameters import Parameters

NOTEBOOKS = headless.NOTEBOOKS
CONVERT = NOTEBOOKS / "4-convert.ipynb"

TARGET = "to generation rope dtype shards max_shard_size assets tie with_optimizer"
PARAMETERS = {
    "1-browse-index": "source values interactive",
    "2-preview-keys": f"source {TARGET} interactive",
    "3-rope-layouts": "source prompt interactive",
    "4-convert": f"source target {TARGET} overwrite interactive",
    "5-verify": "source target other interactive",
    "6-rope-scaling": "source interactive",
}
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


@pytest.mark.thorough
def test_default_target_is_in_the_working_folder_and_may_be_replaced(tmp_path: Path) -> None:
    for _ in range(2):
        assert headless.run(CONVERT.name, tmp_path).returncode == 0
    assert (tmp_path / "converted" / f"{sample_path().name}-titan-0.3" / ".metadata").is_file()


@pytest.mark.parametrize(
    ("parameter", "reason"),
    [
        ("sorce=/data", "unknown parameter 'sorce'; did you mean 'source'?"),
        pytest.param(
            "shards=two",
            "parameter shards must be int; got 'two'",
            marks=pytest.mark.thorough,
        ),
        pytest.param("source=/nowhere", "/nowhere: not found", marks=pytest.mark.thorough),
    ],
)
def test_invalid_parameter_or_source_fails_with_the_reason_as_the_last_line(
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
        ({"generation": "titan-9"}, "generation must be one of titan-0.3"),
        ({"shards": 0}, "shards must be between 1 and 65536; got 0"),
        ({"max_shard_size": "big"}, "invalid size 'big'; use a number with a unit, such as 5GB"),
        ({"shards": True}, "parameter shards must be int; got True"),
        ({"source": 1000}, "source must be str; got 1000. papermill's -p turns 1000"),
        ({"target": None}, "pass text with -r target VALUE"),
        ({"interactive": "perhaps"}, "interactive must be one of auto, yes, no; got 'perhaps'"),
        (
            {"In": ["x", "# Parameters\ndtpye = 'keep'\n"]},
            "unknown parameter 'dtpye'; did you mean",
        ),
        ({"In": ["# Parameters\nzzz = 1\n"]}, "unknown parameter 'zzz'. The notebook has source,"),
    ],
)
def test_invalid_parameters_are_refused(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(RefusedError, match=re.escape(reason)):
        Parameters.of("4-convert", namespace(**changes))


def test_controls_are_shown_in_a_kernel_of_a_jupyter_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    assert not Parameters.of("4-convert", namespace()).wants_controls
    assert Parameters.of("4-convert", namespace(interactive="yes")).wants_controls
    monkeypatch.setenv("JPY_SESSION_NAME", "notebook")
    assert Parameters.of("4-convert", namespace()).wants_controls
    assert not Parameters.of("4-convert", namespace(interactive="no")).wants_controls


def test_prompt_of_the_lesson_is_text_and_part_of_the_headless_command() -> None:
    assert not Parameters.of("3-rope-layouts", namespace()).prompt
    given = Parameters.of("3-rope-layouts", namespace(prompt="Once upon"))
    assert given.prompt == "Once upon"
    assert "-p prompt 'Once upon' --execution-timeout" in given.headless()
    with pytest.raises(RefusedError, match=r"prompt must be str; got 42.*-r prompt VALUE"):
        Parameters.of("3-rope-layouts", namespace(prompt=42))


def test_other_of_notebook_5_is_a_command_of_its_own() -> None:
    empty = {**namespace(), "other": ""}
    assert "compare" not in Parameters.of("5-verify", empty).headless()
    given = Parameters.of("5-verify", {**empty, "source": "a", "target": "b", "other": "c d"})
    *_, checks, comparison = given.headless().splitlines()
    assert (checks, comparison) == ("llamaconv verify a b", "llamaconv compare a 'c d'")


@pytest.mark.parametrize("value", ["1000", "1e5", "None", "True"])
def test_headless_command_passes_text_that_looks_like_a_number_with_r(value: str) -> None:
    parameters = Parameters.of("4-convert", namespace(source=value, shards=2))
    assert f"-r source {value} " in parameters.headless()
    assert "-p shards 2" in parameters.headless()


def test_headless_commands_contain_the_parameters() -> None:
    parameters = Parameters.of(
        "4-convert", namespace(source="/data/my model", dtype="float32", shards=4)
    )
    papermill_command, command = parameters.headless().splitlines()
    assert "-p source '/data/my model' -p target" in papermill_command
    assert "-p dtype float32 -p shards 4" in papermill_command
    assert "llamaconv convert '/data/my model'" in command
    assert "--dtype float32 --shards 4" in command


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "tiny-llama-titan-0.3"),
        ({"generation": "titan-0.2"}, "tiny-llama-titan-0.2"),
        ({"dtype": "float32", "rope": "half_split"}, "tiny-llama-titan-0.3-half_split-float32"),
        ({"to": "hf", "rope": "half_split"}, "tiny-llama-hf"),
        ({"to": "meta", "dtype": "float16"}, "tiny-llama-meta-float16"),
    ],
)
def test_default_target_is_named_after_what_it_holds(changes: dict[str, object], name: str) -> None:
    assert Parameters.of("4-convert", namespace(**changes)).target == Path("converted") / name


def test_default_target_of_a_dcp_is_named_after_the_hugging_face_folder(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".metadata").touch()
    parameters = Parameters.of("4-convert", namespace(source=str(tmp_path / "run")))
    assert parameters.target == Path("converted/run-hf")


def test_only_the_samples_own_folder_is_replaced_without_being_asked() -> None:
    assert Parameters.of("4-convert", namespace()).may_replace
    assert not Parameters.of("4-convert", namespace(source="/data/mine")).may_replace
    assert not Parameters.of("4-convert", namespace(target="mine")).may_replace
    assert "--overwrite" not in Parameters.of("4-convert", namespace(source="/data")).headless()
    assert Parameters.of("4-convert", namespace(source="/data", overwrite=True)).may_replace


def test_source_with_errors_stops_before_anything_is_written(tmp_path: Path) -> None:
    source = checkpoints.write(tmp_path / "hf", num_key_value_heads=4, hidden_act="gelu")
    done = headless.run(CONVERT.name, tmp_path, f"source={source}", "target=out")
    assert done.returncode != 0
    for words in (
        "hidden_act must be 'silu' in a Llama; got 'gelu'",
        "[16, 64]",
        "[32, 64]",
    ):
        assert words in done.stderr
    assert "error: " in [line for line in done.stderr.splitlines() if line.strip()][-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("path", "notebook"), PROSE_AND_CODE, ids=lambda value: getattr(value, "stem", "")
)
def test_the_notebooks_keep_their_form(path: Path, notebook: nbformat.NotebookNode) -> None:
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    prose = [cell for cell in notebook.cells if cell.cell_type == "markdown"]
    parameters = papermill.inspect_notebook(str(path))
    assert set(parameters) == set(PARAMETERS[path.stem].split())
    for name, parameter in parameters.items():
        value = ast.literal_eval(parameter["default"])
        assert parameter["inferred_type_name"] == type(value).__name__, name
        assert len(parameter["help"]) > 10, name
    assert len(prose) >= len(code)
    text = "".join(cell.source for cell in prose)
    assert text.count("<details>") == text.count("</details>")
    assert notebook.metadata.kernelspec.name == "python3"
    assert "widgets" not in notebook.metadata
    for cell in code:
        if "parameters" not in cell.metadata.get("tags", []):
            assert len(cell.source.splitlines()) <= 8
        assert cell.execution_count, (
            "outputs are committed with their counts: run notebooks/make.py"
        )
        # Logic is in the package; only the lesson shows code on purpose.
        if "show-code" not in cell.metadata.get("tags", []):
            nodes = ast.walk(ast.parse(cell.source))
            assert not [node for node in nodes if isinstance(node, ast.FunctionDef)]
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr"


@pytest.mark.parametrize(
    ("path", "notebook"), PROSE_AND_CODE, ids=lambda value: getattr(value, "stem", "")
)
def test_every_picture_has_an_alt_text(path: Path, notebook: nbformat.NotebookNode) -> None:
    text = nbformat.writes(notebook)
    images = re.findall(r"<img [^>]*>", text)
    assert images
    for image in images:
        assert len(re.search(r'alt=\\"([^"]*)\\"', image)[1]) > 40  # type: ignore[index]


def imported_elsewhere(code: str) -> list[str]:
    """The package's modules in the imports of ``code`` that are not for notebooks."""
    modules = {
        name
        for node in ast.walk(ast.parse(code))
        for name in (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else []
        )
    }
    return sorted(
        name
        for name in modules
        if name.startswith("llamaconv.") and not f"{name}.".startswith("llamaconv.notebook.")
    )


@pytest.mark.parametrize(
    ("path", "notebook"), PROSE_AND_CODE, ids=lambda value: getattr(value, "stem", "")
)
def test_notebooks_import_only_public_names_and_the_notebook_room(
    path: Path, notebook: nbformat.NotebookNode
) -> None:
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    assert any("from llamaconv.notebook" in source for source in code), path
    assert not [found for source in code if (found := imported_elsewhere(source))]


@pytest.mark.parametrize(
    "code",
    [
        "from llamaconv.report.progress import Bar",
        "import llamaconv.verify.receipt_check",
        "def f():\n    from llamaconv.notebooks import x",
    ],
)
def test_import_of_another_room_is_seen(code: str) -> None:
    assert imported_elsewhere(code)
    assert not imported_elsewhere("from llamaconv import open_checkpoint")
    assert not imported_elsewhere("from llamaconv.notebook.panels import browse")
