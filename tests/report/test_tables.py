"""Tables for terminals and notebooks, and what strangers' names must not do in them."""

import pytest

from llamaconv.report.tables import Table, parse_size, size


def test_columns_line_up_and_numbers_stand_right() -> None:
    table = Table(("name", "n"), [("a", 1), ("long name", 1000)], right=("n",))
    assert str(table).splitlines() == [
        "name          n",
        "---------  ----",
        "a             1",
        "long name  1000",
    ]


def test_table_says_how_many_rows_are_left_out() -> None:
    table = Table(("n",), [(i,) for i in range(100)], most=3)
    assert str(table).splitlines()[-1] == "… and 97 more rows"
    assert "… and 97 more rows" in table._repr_html_()


def test_names_are_text_in_html_and_in_a_terminal() -> None:
    evil = "<img src=x onerror=alert(1)>\x1b[2J"
    table = Table(("name",), [(evil,)], caption=evil)
    assert "<img" not in table._repr_html_()
    assert "&lt;img src=x onerror=alert(1)&gt;" in table._repr_html_()
    assert "\x1b" not in str(table) + table._repr_html_()


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1640704, "1.64 MB"),
        (999_900_000, "1 GB"),
        (16e12, "16 TB"),
    ],
)
def test_sizes_in_powers_of_ten(n_bytes: int, text: str) -> None:
    assert size(int(n_bytes)) == text


@pytest.mark.parametrize(
    "text", ["", "GB", "-5GB", "5 ZB", "1e9", "0x5", "9" * 400, f"{'9' * 5000}GB"]
)
def test_invalid_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="invalid size"):
        parse_size(text)


def test_runs_of_spaces_in_a_cell_are_kept_in_a_notebook() -> None:
    shown = Table(("text",), [("a  b",), ("a b",)])._repr_html_()
    assert 'white-space:pre-wrap">a  b' in shown and shown.count("pre-wrap") == 1
