"""What a fresh process imports: looking into a folder must not wait for torch."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import llamaconv

PACKAGE = Path(llamaconv.__file__).parent


def imported_by(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has after ``code``."""
    script = f"{code}\nimport sys; print(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return set(done.stdout.splitlines()[-1].split())


LOOK = "import llamaconv; llamaconv.make_plan(llamaconv.open_checkpoint(llamaconv.sample_path()))"
HEAVY = {"torch", "numpy", "safetensors", "matplotlib", "ipywidgets", "IPython"}
HEAVY |= {"huggingface_hub", "httpx", "httpx2"}


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
    assert not imported_by("import llamaconv.convert, llamaconv.cli") & {"matplotlib", "ipywidgets"}


def test_pictures_and_panels_do_not_wait_for_torch() -> None:
    assert "torch" not in imported_by("import llamaconv.figures, llamaconv.panels")
    assert "torch" in imported_by("import llamaconv.panels.lesson"), "the test can fail"


# Each room may import those before it; a house with one direction has no cycles.
ORDER = [
    "version problems ranks journal files tables params config params_json keys foreign rope family shell remote scratch pieces piece_reader opened small_files place torch_rows threads compare sample model titan receipt advice",
    "fused",
    "formats progress",
    "plan head assets index_diff browse",
    "target_check",
    "planner staging preview agreement",
    "checks torch_metadata oracles stated",
    "comparison",
    "structure",
    "receipt_check",
    "verify engine",
    "convert",
    "roundtrip damage",
    "lesson sample_rows",
    "figures",
    "notebook",
    "panels",
    "cli __main__ __init__",
]


def imports_of(path: Path) -> set[str]:
    """Rooms of the package that a file imports, lazily or not; type-checking aside."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    rooms: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and id(node) not in typing_only:
            module = node.module or ""
            if module == "llamaconv":
                rooms.update(alias.name for alias in node.names)
            elif module.startswith("llamaconv."):
                rooms.add(module.split(".")[1])
    return rooms


def test_imports_run_one_way() -> None:
    floor = {room: number for number, rooms in enumerate(ORDER) for room in rooms.split()}
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for other in imports_of(path) - {room}:
            if room in ("sample", "__init__"):
                continue  # the training script uses the model; the package names all
            assert floor[other] <= floor[room], f"{room} imports {other}"


def test_only_figures_draws_and_only_panels_has_controls() -> None:
    for module, only in (("matplotlib", "figures"), ("ipywidgets", "panels")):
        users = {
            path.relative_to(PACKAGE).parts[0]
            for path in PACKAGE.rglob("*.py")
            if re.search(rf"^\s*(import|from) {module}", path.read_text(), re.MULTILINE)
        }
        assert users == {only}


def test_there_are_ten_public_names_at_most() -> None:
    assert len(llamaconv.__all__) <= 10
    for name in llamaconv.__all__:
        assert getattr(llamaconv, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        llamaconv.nothing  # noqa: B018
