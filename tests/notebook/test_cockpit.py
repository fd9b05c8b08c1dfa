"""The cockpit: its numbers, its picture, and what a page must not contain. tests/browser works it."""

from __future__ import annotations

import base64
import itertools
import re
import tomllib
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import checkpoints

from llamaconv import sample_path
from llamaconv.model import rope
from llamaconv.model.names import Layout
from llamaconv.notebook import lesson
from llamaconv.notebook.cockpit import Cockpit, cockpit
from llamaconv.notebook.cockpit.small_head import SmallHead
from llamaconv.notebook.cockpit.still import joined_rows, number, still
from llamaconv.notebook.lesson.rotation import inverse_frequencies, projected

LAYOUTS: tuple[Layout, Layout] = ("half_split", "interleaved")
COMBINATIONS = list(itertools.product(LAYOUTS, LAYOUTS))
# The checkout's, whatever is installed.
PACKAGE = Path(__file__).parents[2] / "llamaconv"


@pytest.fixture(scope="module")
def shown() -> Cockpit:
    return cockpit(lesson.open_specimen(sample_path()))


def score(head: SmallHead, rows: Layout, rotation: Layout, position: int, distance: int) -> float:
    """What `rope.scores` gives for the small head, without the division by the root of its rows."""
    q, k = (
        rope.relayout(torch.tensor(x), 1, "half_split", rows)[None, None] for x in (head.q, head.k)
    )
    ends = torch.tensor([position + distance, position])
    angles_PF = rope.angles(ends, torch.tensor(head.speeds))
    scores = rope.scores(q.expand(2, 1, -1), k.expand(2, 1, -1), angles_PF, rotation)
    return scores[0, 0, 1].item() * len(head.q) ** 0.5


@pytest.mark.parametrize(("rows", "rotation"), COMBINATIONS)
@pytest.mark.parametrize(("position", "distance"), [(0, 0), (2, 3), (24, 1), (7, 24)])
def test_products_of_the_pairs_sum_to_the_score(
    shown: Cockpit, rows: Layout, rotation: Layout, position: int, distance: int
) -> None:
    products = shown.head.products(rows, rotation, position, distance)
    assert sum(products) == pytest.approx(
        score(shown.head, rows, rotation, position, distance), abs=1e-4
    )


def test_matching_combinations_agree_and_others_only_at_distance_0(shown: Cockpit) -> None:
    wanted = sum(shown.head.products("half_split", "half_split", 2, 3))
    for rows, rotation in COMBINATIONS:
        at_0, elsewhere, further = (
            sum(shown.head.products(rows, rotation, *ends)) for ends in ((5, 0), (2, 3), (20, 3))
        )
        plain = sum(q * k for q, k in zip(shown.head.q, shown.head.k, strict=True))
        assert at_0 == pytest.approx(plain, abs=1e-4)
        assert elsewhere == pytest.approx(further, abs=1e-3), "only the difference counts"
        assert (elsewhere == pytest.approx(wanted, abs=1e-3)) == (rows == rotation)


def test_numbers_are_those_of_the_model(shown: Cockpit) -> None:
    specimen = lesson.open_specimen(sample_path())
    q_PHD, k_PGD = projected(specimen, "half_split", specimen.excerpt)
    rows = [0, 1, 2, 3, 8, 9, 10, 11]
    assert torch.allclose(torch.tensor(shown.head.q), q_PHD[5, 0, rows], atol=6e-3)
    assert torch.allclose(torch.tensor(shown.head.k), k_PGD[4, 0, rows], atol=6e-3)
    speeds = inverse_frequencies(specimen)[:4]
    assert torch.allclose(torch.tensor(shown.head.speeds), speeds, atol=6e-6)


def test_head_of_another_model_has_its_own_rows_and_speeds(tmp_path: Path) -> None:
    specimen = lesson.open_specimen(checkpoints.write(tmp_path / "mine"))
    head = cockpit(specimen).head
    assert head.rows == tuple(range(8)) and head.model == "mine"
    assert head.speeds == pytest.approx(inverse_frequencies(specimen)[:4].tolist(), abs=6e-6)
    assert "rows 4 to 7" in cockpit(specimen).note


@pytest.mark.parametrize(("rows", "rotation"), COMBINATIONS)
def test_rotation_joins_partners_only_if_it_belongs_to_the_rows(
    rows: Layout, rotation: Layout
) -> None:
    partners = {first % 4 == second % 4 for *_, first, second in joined_rows(rows, rotation, 4)}
    assert partners == {rows == rotation}


def test_picture_has_both_cases_with_their_scores(shown: Cockpit) -> None:
    picture = still(shown.head, shown.start)
    ET.fromstring(picture)
    for rotation in LAYOUTS:
        wanted = number(score(shown.head, "half_split", rotation, 2, 3), 2)
        assert f">{wanted}</tspan>" in picture
        assert wanted in shown.alt
    assert picture.count("stroke-dasharray") == 4, "wrong arcs differ by more than their colour"
    bundle = shown._repr_mimebundle_()
    assert bundle["image/svg+xml"] == picture
    assert base64.b64encode(picture.encode()).decode() in bundle["text/html"]


def test_small_numbers_are_shown_with_more_digits(shown: Cockpit) -> None:
    """As those of weights that were only initialised."""
    assert shown.head.digits == 2
    head = replace(shown.head, q=tuple(x / 100 for x in shown.head.q))
    assert head.digits == 3
    assert "score is 0.254." in Cockpit(head).alt and "off by 0.242" in Cockpit(head).alt
    assert ">0.254</tspan>" in still(head, shown.start)


def test_fragment_is_small_repeatable_and_has_no_address(shown: Cockpit) -> None:
    fragment = shown._repr_html_()
    assert len(fragment.encode()) < 25_000
    assert fragment == cockpit(lesson.open_specimen(sample_path()))._repr_html_()
    assert not re.search(r"https?:|//[a-z]+\.|import\(|fetch\(|\sid=", fragment)
    assert "_COLOUR" not in fragment and "HEAD_JSON" not in fragment


def test_name_of_a_model_cannot_leave_its_place(shown: Cockpit) -> None:
    head = replace(shown.head, model="</script><img src=x onerror=alert(1)>")
    fragment = Cockpit(head)._repr_html_()
    assert fragment.count("</script>") == 1 and "<img src=x" not in fragment


def test_every_file_of_the_package_that_is_no_module_gets_into_the_wheel() -> None:
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["llamaconv"]
    packed = {path for pattern in patterns for path in PACKAGE.glob(pattern)}
    files = {path for path in PACKAGE.rglob("*") if path.is_file()}
    assert {path for path in files if path.suffix not in (".py", ".pyc")} <= packed
