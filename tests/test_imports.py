"""What a fresh process imports: looking into a folder must not wait for torch."""

import ast
import re
from pathlib import Path

import pytest
from support.imported import HEAVY, imported_by

import llamaconv

PACKAGE = Path(llamaconv.__file__).parent


LOOK = "import llamaconv; llamaconv.make_plan(llamaconv.open_checkpoint(llamaconv.sample_path()))"


@pytest.mark.parametrize(
    "code",
    [
        "import llamaconv",
        f"{LOOK}.table()",
        "from llamaconv.cli import main; main(['inspect', str(__import__('llamaconv').sample_path())])",
        "from llamaconv.cli import main; main(['plan', str(__import__('llamaconv').sample_path()), '--json'])",
    ],
)
def test_looking_into_a_folder_imports_nothing_heavy(code: str) -> None:
    assert not imported_by(code) & HEAVY


def test_the_test_above_can_fail() -> None:
    assert "torch" in imported_by("import llamaconv; llamaconv.convert_checkpoint")


def test_converting_imports_no_pictures() -> None:
    assert not imported_by("import llamaconv.convert.convert, llamaconv.cli") & {
        "matplotlib",
        "ipywidgets",
    }


def test_pictures_and_panels_do_not_wait_for_torch() -> None:
    assert "torch" not in imported_by(
        "import llamaconv.notebook.figures, llamaconv.notebook.panels"
    )
    assert "torch" in imported_by("import llamaconv.notebook.panels.lesson"), "the test can fail"


# A file may import its own room and the rooms before it; a house with one direction has no circle.
ORDER = [
    "report",
    "sample",
    "model",
    "checkpoint",
    "torchtitan",
    "plan",
    "ranks",
    "verify",
    "convert",
    "notebook",
    "cli",
    "__main__",
]
# Untrusted bytes are read with the help of these alone.
UNTRUSTED = {"llamaconv.report", "llamaconv.checkpoint.tensors", "llamaconv.checkpoint.untrusted"}


def imports_of(code: str) -> set[str]:
    """Modules of the package that ``code`` imports: lazily or not, for the type checker too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llamaconv"):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("llamaconv.")}
    return found


def against_the_order(room: str, code: str) -> list[str]:
    """The imports of a file of ``room`` that run to the right."""
    allowed = {*ORDER[: ORDER.index(room) + 1], "__version__"}
    return sorted(one for one in imports_of(code) if one.split(".")[1] not in allowed)


def beyond_untrusted(code: str) -> list[str]:
    """What a reader of untrusted bytes imports of the package and should not."""
    return sorted(
        one for one in imports_of(code) if not any(one.startswith(f"{each}.") for each in UNTRUSTED)
    )


def files() -> list[tuple[str, str]]:
    """Room and content of every file of the package but its own ``__init__``."""
    paths = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]
    return [
        (path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path.read_text()) for path in paths
    ]


def test_imports_run_one_way() -> None:
    wrong = {room: found for room, code in files() if (found := against_the_order(room, code))}
    assert not wrong


@pytest.mark.parametrize(
    "code",
    [
        "from llamaconv.convert.engine import Engine",
        "from llamaconv import cli",
        "import llamaconv.notebook.browse",
        "def f():\n    from llamaconv.convert import engine",
        "if TYPE_CHECKING:\n    from llamaconv.convert.engine import Engine",
    ],
)
def test_an_import_the_other_way_is_seen(code: str) -> None:
    assert against_the_order("verify", code)
    assert not against_the_order("verify", "from llamaconv.model.names import ROLES")


def test_readers_of_untrusted_bytes_import_next_to_nothing() -> None:
    for path in (PACKAGE / "checkpoint" / "untrusted").glob("*.py"):
        assert not beyond_untrusted(path.read_text()), path.name
    assert beyond_untrusted("from llamaconv.checkpoint.reader import PieceReader"), "it can fail"
    assert beyond_untrusted("from llamaconv.model import names"), "it can fail"


def users_of(module: str) -> set[str]:
    """Folders of the package in which a file imports a library."""
    return {
        str(path.relative_to(PACKAGE).parent)
        for path in PACKAGE.rglob("*.py")
        if re.search(rf"^\s*(import|from) {module}\b", path.read_text(), re.MULTILINE)
    }


def test_only_figures_draws_and_only_panels_has_controls() -> None:
    assert users_of("matplotlib") == {"notebook/figures"}
    assert users_of("ipywidgets") == {"notebook/panels"}
    assert "convert" in users_of("torch"), "the two above can fail"


def test_public_names_are_exactly_these_ten() -> None:
    errors = {"FailedError", "RefusedError"}
    values = {"LlamaParams", "Target", "__version__"}
    functions = {f"{verb}_checkpoint" for verb in ("open", "convert", "verify")}
    names = errors | values | functions | {"make_plan", "sample_path"}
    assert set(dir(llamaconv)) == names == set(llamaconv.__all__)
    for name in names:
        assert getattr(llamaconv, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        llamaconv.nothing  # noqa: B018
