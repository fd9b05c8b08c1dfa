"""The pictures: colours on both grounds, what the alt text claims, and the output of a cell."""

from __future__ import annotations

import base64
import io
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from IPython.core.formatters import DisplayFormatter
from matplotlib.colors import to_rgb
from PIL import Image
from support import checkpoints

from llamaconv import sample_path
from llamaconv.model import rope
from llamaconv.notebook import figures, lesson
from llamaconv.notebook.figures import outcomes
from llamaconv.notebook.figures import picture as pictures
from llamaconv.notebook.figures.picture import COLOURS, GROUNDS, INK, RIGHT, WRONG, Picture
from llamaconv.notebook.lesson import Losses, Specimen

# A notebook would show a warning, such as that of a missing glyph.
pytestmark = pytest.mark.filterwarnings("error::UserWarning")


def contrast(one: str, other: str) -> float:
    """The contrast of two colours by WCAG 2.2, from 1 for the same to 21."""

    def luminance(colour: str) -> float:
        linear = [
            value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
            for value in to_rgb(colour)
        ]
        return float(np.dot((0.2126, 0.7152, 0.0722), linear))

    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("colour", [RIGHT, WRONG, INK, *COLOURS])
def test_colours_can_be_seen_on_both_grounds_and_carry_white_text(colour: str) -> None:
    assert contrast("#FFFFFF", "#000000") == pytest.approx(21)
    assert min(contrast(colour, ground) for ground in GROUNDS) > 3
    assert contrast(colour, "#FFFFFF") > 3


def test_right_and_wrong_have_colours_of_their_own() -> None:
    assert len({RIGHT, WRONG, INK, *COLOURS}) == 3 + len(COLOURS)


@pytest.fixture(scope="module")
def specimen() -> Specimen:
    return lesson.open_specimen(sample_path())


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Specimen:
    folder = tmp_path_factory.mktemp("untrained")
    return lesson.open_specimen(
        checkpoints.write_model(folder / "source", replace(checkpoints.GQA, n_layers=1))
    )


def pixels(picture: Picture) -> Any:
    return np.asarray(Image.open(io.BytesIO(picture.png)).convert("RGBA")).astype(int)


def area(picture: Picture, colour: str) -> int:
    """How many pixels have the colour, up to the palette of the file."""
    wanted = np.array([round(255 * value) for value in to_rgb(colour)])
    found = pixels(picture)
    near = np.abs(found[..., :3] - wanted).max(axis=-1) < 12
    return int((near & (found[..., 3] > 200)).sum())


# The output of a cell.


def test_cell_output_has_the_figure_the_png_and_the_text() -> None:
    picture = figures.the_bug()
    data, metadata = DisplayFormatter().format(picture)
    assert set(data) == {"text/html", "image/png", "text/plain"}
    assert base64.b64decode(data["image/png"]) == picture.png
    assert data["text/html"] == picture._repr_html_()
    assert data["text/plain"] == repr(picture) == f"<Picture: {picture.alt}>"
    assert metadata["image/png"] == {"alt": picture.alt, "width": picture.width}
    assert f'alt="{picture.alt}" width="{picture.width}"' in data["text/html"]
    assert f"<figcaption>{picture.caption}</figcaption>" in data["text/html"]


def test_picture_is_transparent_and_twice_as_wide_as_it_is_shown() -> None:
    picture = figures.pairings()
    found = pixels(picture)
    assert found.shape[1] == 2 * picture.width
    assert found[0, -1, 3] == found[-1, 0, 3] == 0
    assert 0.5 < (found[..., 3] == 0).mean() < 0.95
    assert figures.pairings() == picture
    assert len(picture.png) < 50_000


def test_markup_in_a_caption_is_text() -> None:
    html = Picture(figures.the_bug(4).png, 'a "<b>"', "<i>&")._repr_html_()
    assert 'alt="a &quot;&lt;b&gt;&quot;"' in html and "&lt;i&gt;&amp;<" in html


# Right and wrong by what was done, not by the result.


def losses_of(**values: float) -> Losses:
    return Losses({name: torch.full((20,), value) for name, value in values.items()}, "token")


@pytest.mark.parametrize("wrong", [5.0, 5.01, 4.0, 9.0])
def test_first_bar_is_the_right_one_whatever_the_losses(wrong: float) -> None:
    picture = figures.loss_bars(losses_of(right=5.0, one=wrong, other=wrong), 1000)
    # Two bars, hatched, and their marks.
    assert 0.9 * wrong / 5 < area(picture, WRONG) / area(picture, RIGHT) < 2.1 * wrong / 5
    level = abs(wrong - 5) < 0.05
    assert ("2 within 0.05 nats" in picture.alt) == level
    assert ("2 better" in picture.alt) == (wrong == 4)
    assert ("Every wrong run is worse" in picture.alt) == (wrong == 9)


def test_same_layouts_are_the_right_squares_whatever_the_losses() -> None:
    names = [
        f"{rows} rows, {rotation} rotation"
        for rows in ("half_split", "interleaved")
        for rotation in ("half_split", "interleaved")
    ]
    for found, claim in (
        ((1.5, 4.8, 5.0, 1.5), "lower than the two wrong ones"),
        ((7.0, 7.0, 7.0, 7.0), "do not show it"),
        ((7.0, 6.0, 6.0, 7.0), "do not show it"),
    ):
        picture = figures.layouts_and_rotations(losses_of(**dict(zip(names, found, strict=True))))
        assert claim in picture.alt
        assert 0.6 < area(picture, WRONG) / area(picture, RIGHT) < 1
        left_to_right = pixels(picture)
        top_left = left_to_right[: len(left_to_right) // 3, : left_to_right.shape[1] * 3 // 5]
        blue = top_left[..., 2] - top_left[..., 0]
        assert (blue > 100).sum() > (blue < -100).sum()


def test_pictures_of_untrained_weights_claim_nothing_that_is_false(untrained: Specimen) -> None:
    losses = lesson.losses(untrained)
    right, *wrong = losses.means.values()
    worse = sum(loss > right + 0.05 for loss in wrong)
    assert worse < len(wrong), "otherwise this test tests nothing"
    bars = figures.loss_bars(losses, untrained.params.vocab_size)
    assert f"Of 5 wrong runs, {worse} are worse than the right one" in bars.alt
    assert area(bars, RIGHT) < area(bars, WRONG)
    square = figures.layouts_and_rotations(lesson.losses_by_layout(untrained))
    assert "do not show it" in square.alt
    by_position = figures.loss_by_position(losses)
    assert f"right {losses.by_name['right'][0]:.1f}, the wrong ones" in by_position.alt


def test_line_of_any_loss_stays_within_the_axes(monkeypatch: pytest.MonkeyPatch) -> None:
    checked = []

    def check(figure: Any, *_: str) -> None:
        low, high = figure.axes[0].get_ylim()
        for line in figure.axes[0].lines:
            assert low <= min(line.get_ydata()) and max(line.get_ydata()) <= high
            checked.append(line)

    monkeypatch.setattr(outcomes, "picture", check)
    for values in ((0.001, 0.002), (12.0, 11.0), (1.5, 40.0)):
        figures.loss_by_position(losses_of(right=values[0], wrong=values[1]))
    assert len(checked) == 6


def test_lines_have_the_colour_of_their_variant(specimen: Specimen) -> None:
    errors = lesson.score_errors(specimen, most=16, windows=1)
    both = figures.error_by_distance(errors, ("right", "not reordered"))
    wrong = figures.error_by_distance(errors, ("not reordered", "twice"))
    assert area(both, RIGHT) > 1000 < area(both, WRONG)
    assert area(wrong, RIGHT) < 50


def test_agreement_by_length_names_its_groups_and_shares() -> None:
    shares = {
        "one": torch.tensor([1.0, 0.5, 0.4, 0.3, 0.3, 0.1, 0.1, 0.1]),
        "other": torch.tensor([0.9, 0.5, 0.4, 0.3, 0.3, 0.0, 0.0, 0.0]),
    }
    picture = figures.agreement_by_length(lesson.AgreementByLength(shares, 3, "byte"))
    assert "After 1: one 100%, other 90%. After 6–8: one 10%, other 0%" in picture.alt
    assert "3 windows" in picture.caption


@pytest.mark.parametrize("heights", [[0.5] * 6, [0.1, 0.5, 0.52, 0.9], [0.3], [0.0, 0.1, 0.1]])
def test_labels_that_would_overlap_move_apart_and_the_others_stay(heights: list[float]) -> None:
    found = pictures._spread(heights, 0.1)
    assert all(b - a > 0.1 - 1e-9 for a, b in itertools.pairwise(found))
    assert found[0] >= 0
    if heights[0]:
        assert sum(found) == pytest.approx(sum(heights))
    if heights[-1] == 0.9:
        assert found[0] == 0.1 and found[-1] == 0.9


# Rows and pairs.


@pytest.mark.parametrize("head_dim", [4, 8, 16])
def test_the_bug_is_that_neighbours_of_half_split_rows_are_no_pair(head_dim: int) -> None:
    picture = figures.the_bug(head_dim)
    assert picture.alt.count("every arc joins the two rows of a pair") == 2
    assert picture.alt.endswith("THE BUG: every arc joins rows of two different pairs.")
    assert f"code that pairs i with i + {head_dim // 2}: every arc joins the two" in picture.alt
    assert area(picture, WRONG) > 1000 < area(picture, RIGHT)


@pytest.mark.parametrize(
    ("wrong", "heads", "head_dim", "drawn"),
    [(8, 2, 16, 16), (1, 3, 8, 24), (1, 3, 64, 24), (32, 8, 128, 16), (1, 2, 16, 16)],
)
def test_picture_of_miscounted_heads_counts_what_the_reordering_does(
    wrong: int, heads: int, head_dim: int, drawn: int
) -> None:
    picture = figures.heads_miscounted(wrong, heads, head_dim)
    order = rope.half_split_to_interleaved(torch.arange(heads * head_dim), wrong).view(-1, 2)
    pairs = (order[:, 1] == order[:, 0] + head_dim // 2) & (order[:, 0] % head_dim < head_dim // 2)
    assert not pairs.any()
    assert picture.alt.startswith(f"{drawn} rows of k")
    assert f"0 of {drawn // 2} arcs join rows that are no pair" in picture.alt
    assert picture.alt.endswith(f"{drawn // 2} of {drawn // 2}.")
    assert (f"Heads of {head_dim} rows are drawn with" in picture.caption) == (
        wrong != 8 and head_dim > 8
    )


def test_angle_is_the_same_at_the_same_distance_and_said_to_differ_at_another(
    specimen: Specimen,
) -> None:
    found = lesson.same_distance(specimen)
    alt = figures.same_distance(found).alt
    assert "The angle is the same" in alt
    q, k = (points[0].double().numpy() for points in (found.q, found.k))
    angle = np.degrees(np.arccos(q @ k / np.linalg.norm(q) / np.linalg.norm(k)))
    assert alt.count(f"{angle:.0f} degrees") == 2
    turned = replace(found, q=torch.stack([found.q[0], -found.q[0]]))
    assert "The angles differ" in figures.same_distance(turned).alt


@pytest.mark.parametrize("row", [0, 3, 15])
def test_number_of_q_is_its_row_times_the_input(specimen: Specimen, row: int) -> None:
    found = lesson.projection(specimen, row)
    alt = figures.projection(found).alt
    product = (found.rows[row].double() @ found.x.double()).item()
    assert f"Number {row} of q, {product:.2f}, is row {row} of W_q times x: 128 products" in alt


def test_projection_of_a_long_head_shows_the_rows_around_the_one_that_is_lit() -> None:
    rows, x = torch.randn(128, 40), torch.randn(40)
    found = lesson.Projection(100, rows, x, rows @ x)
    assert "Rows 92 to 107 are drawn" in figures.projection(found).caption
    assert "Rows 112 to 127" in figures.projection(replace(found, row=127)).caption


# Attention.


def test_attention_maps_are_drawn_with_any_bytes_and_tokens_as_labels(specimen: Specimen) -> None:
    maps = lesson.attention_maps(specimen, 1, 0)
    plain = figures.attention_maps(replace(maps, labels=()))
    assert "on 40 bytes" in plain.caption
    for labels in (list("$a$ {}\n\t\\^_" * 4), ["<s>", " preserve", "$x^$", "é", "\x00"] * 8):
        named = figures.attention_maps(replace(maps, labels=tuple(labels[:40])))
        assert "the first 14 of 40 bytes" in named.caption
        assert named.alt == plain.alt and named.png != plain.png


def test_score_maps_say_what_they_show(specimen: Specimen) -> None:
    agreement = lesson.agreement(specimen)
    assert "The first two are alike" in figures.score_maps(agreement).alt
    assert "zero on the diagonal" in figures.score_maps(agreement).alt
    split, woven, wrong = agreement.maps
    changed = replace(agreement, maps=(split, 2 * woven, wrong + 1))
    assert "The first two are not alike" in figures.score_maps(changed).alt
    assert "zero on the diagonal" not in figures.score_maps(changed).alt


def test_scaling_of_another_release_is_wrong_and_the_same_is_right() -> None:
    layout = lesson.layout_mismatch()
    same = figures.mismatch_by_distance(lesson.mismatch("Llama 3.1", "Llama 3.1"), layout)
    other = figures.mismatch_by_distance(lesson.mismatch("Llama 3.2", "Llama 3.1"), layout)
    assert area(same, RIGHT) > 1000 and area(same, WRONG) < 50
    assert area(other, WRONG) > 1000 and area(other, RIGHT) < 50


def test_readme_picture_is_saved_as_the_png(tmp_path: Path) -> None:
    picture = figures.head_layouts(8)
    picture.save(tmp_path / "one.png")
    assert (tmp_path / "one.png").read_bytes() == picture.png
