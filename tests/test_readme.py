"""The README's claims that code can check: paths, options, choices, commands."""

import re
from pathlib import Path

import pytest

from llamaconv.cli import main
from llamaconv.keys import NAMINGS
from llamaconv.plan import CHOICES
from llamaconv.titan import GENERATIONS

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


def test_there_are_two_commands_for_all_the_set_up() -> None:
    commands = [line for line in README.splitlines() if line.startswith("pip install")]
    assert len(commands) == 2
