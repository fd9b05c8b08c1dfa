"""What code can check of the README and its neighbours: links, the address, commands, options."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

from llamaconv.cli import main
from llamaconv.model.names import GENERATIONS, NAMINGS
from llamaconv.plan.target import CHOICES
from llamaconv.sample import write_sample

ROOT = Path(__file__).parents[1]
TEXTS = {
    name: (ROOT / name).read_text()
    for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
}
README = TEXTS["README.md"]
ROOMS = {init.parent.name: init for init in (ROOT / "llamaconv").glob("*/__init__.py")}
ADDRESS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]


def blocks(language: str) -> list[str]:
    """The README's blocks of code in a language; "" for output."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name == language]


def headings(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a text."""
    found = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in found}


@pytest.mark.parametrize("name", TEXTS)
def test_every_link_and_every_path_exists(name: str) -> None:
    text = TEXTS[name]
    for link in re.findall(r"\]\((?!https?://)([^)]+)\)", text):
        path, _, anchor = link.partition("#")
        assert (ROOT / path).exists(), link
        assert not anchor or anchor in headings(TEXTS[path or name]), link
    for path in re.findall(r"(?<![\w/.])(?:notebooks|tests|binder|\.ci)/[\w./*-]*\w", text):
        assert any(ROOT.glob(path)), path


@pytest.mark.parametrize("name", TEXTS)
def test_every_module_that_is_named_exists(name: str) -> None:
    for path in re.findall(r"`([a-z]+/[\w/.]*)`", TEXTS[name]):
        if path.partition("/")[0] in ROOMS:
            assert (ROOT / "llamaconv" / path).exists(), path


def mentions(text: str) -> list[str]:
    """``OWNER/NAME`` wherever a text names this repository: badge, clone line, or an address."""
    badges = re.findall(r"mybinder\.org/v2/gh/([^/\s]+/[^/\s]+)/", text)
    clones = re.findall(r"git clone https://github\.com/([^/\s]+/[^/\s]+)", text)
    addresses = re.findall(r"github\.com[/:]([^/\s]+/llamaconv)\b", text)
    return badges + clones + addresses


def test_every_mention_of_the_repository_is_the_address_in_pyproject() -> None:
    here = ADDRESS.removeprefix("https://github.com/")
    assert len(mentions(README)) >= 3, "badge, clone line and its address"
    others = [
        *TEXTS.values(),
        (ROOT / "pyproject.toml").read_text(),
        *(path.read_text() for path in (ROOT / "binder").iterdir()),
        *(path.read_text() for path in (ROOT / "notebooks").glob("*.ipynb")),
    ]
    assert {each for text in others for each in mentions(text)} == {here}


def test_a_moved_repository_is_noticed() -> None:
    moved = README.replace(ADDRESS, "https://github.com/someone/else")
    assert set(mentions(moved)) > {"someone/else"}


def test_there_are_two_commands_for_all_the_set_up() -> None:
    commands = [line for line in README.splitlines() if line.startswith("pip install")]
    assert len(commands) == 2


def offered(command: str, capsys: pytest.CaptureFixture[str]) -> set[str]:
    """The options that a command's help names."""
    with pytest.raises(SystemExit):
        main([command, "--help"])
    return set(re.findall(r"--[a-z0-9-]+", capsys.readouterr().out))


def test_the_options_are_those_of_the_code(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("to", "generation", "dtype"):
        choices = " \\| ".join(CHOICES[option])
        assert f"| `--{option} {choices}` |" in README
    table = set(re.findall(r"^\| `(--[a-z0-9-]+)", README, re.MULTILINE))
    assert len(table) == 5
    assert table <= offered("plan", capsys)
    in_prose = set(re.findall(r"`(--[a-z0-9-]+)`", README))
    assert table | in_prose <= offered("convert", capsys)


def test_the_commands_are_those_of_the_code(capsys: pytest.CaptureFixture[str]) -> None:
    lines = "\n".join(blocks("sh")).replace("\\\n", "").splitlines()
    commands = [found for line in lines if (found := re.search(r"\bllamaconv (\w+) (.*)", line))]
    assert len(commands) >= 6
    for name, words in (command.groups() for command in commands):
        assert set(re.findall(r"--[a-z0-9-]+", words)) <= offered(name, capsys)


def test_the_rooms_are_the_folders_by_the_first_line_of_their_docstrings() -> None:
    table = dict(re.findall(r"^\| `llamaconv/(\w+)/` \| (.+) \|$", README, re.MULTILINE))
    docstrings = {
        room: ast.get_docstring(ast.parse(init.read_text())) for room, init in ROOMS.items()
    }
    assert table == {
        room: text and text.splitlines()[0].removesuffix(".") for room, text in docstrings.items()
    }


def test_every_generation_is_named() -> None:
    assert set(GENERATIONS) <= set(NAMINGS)
    for generation in GENERATIONS:
        assert f"`{generation}`" in README


def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_sample("Llama-3.1-8B")
    names: dict[str, object] = {}
    (example,) = blocks("python")
    exec(example, names)
    # The block of output is that of the sample, and so is this.
    printed = names["done"].verification.table()  # type: ignore[attr-defined]
    (output,) = blocks("")
    assert [line[:17] for line in output.splitlines()] == [
        line[:17] for line in str(printed).splitlines()
    ]
    assert output.splitlines()[1].split() == str(printed).splitlines()[1].split()
