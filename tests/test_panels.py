"""Panels driven from Python: what a person's change of a control shows."""

import pytest

from llamaconv import RefusedError
from llamaconv.panels import Choice, Panel, Slider, Switch, Text
from llamaconv.tables import Table


def view(layer: int, kind: str, text: str, all_of_it: bool) -> Table:
    if layer == 3:
        raise RefusedError("layer 3: <b>is not there</b>")
    return Table(("layer", "kind"), [(layer, f"{kind} {text} {all_of_it}")])


def panel() -> Panel:
    return Panel(
        view,
        layer=Slider("layer", 0, 3, 1),
        kind=Choice("kind", (("query", "wq"), ("key", "wk")), "wk"),
        text=Text("search", placeholder="part of a name"),
        all_of_it=Switch("all"),
    )


def test_the_static_form_is_the_first_choice_and_builds_no_widget() -> None:
    made = panel()
    assert "wk  False" in str(made.show(interactive=False))
    assert made.output is None and not made.widgets


def test_each_control_changes_what_is_shown() -> None:
    made = panel()
    made.show(interactive=True)
    assert made.output.value == made.static()._repr_html_()
    for name, value, expected in (
        ("layer", 2, "<td style="),
        ("kind", "wq", "wq  False"),
        ("text", "norm", "wq norm False"),
        ("all_of_it", True, "wq norm True"),
    ):
        before = made.output.value
        made.widgets[name].value = value
        assert made.output.value != before
        assert expected in made.output.value


def test_a_problem_is_shown_as_one_and_goes_away() -> None:
    made = panel()
    made.show(interactive=True)
    made.widgets["layer"].value = 3
    assert 'role="alert"' in made.output.value
    assert "error: layer 3: &lt;b&gt;is not there" in made.output.value
    made.widgets["layer"].value = 0
    assert "error" not in made.output.value


def test_every_control_has_words() -> None:
    made = panel()
    made.show(interactive=True)
    assert all(one.description for one in made.widgets.values())


def test_a_refusal_has_no_traceback_in_a_notebook() -> None:
    assert RefusedError("a\nb")._render_traceback_() == ["error: a\\nb"]


def test_a_wrong_name_of_a_control_is_an_error_at_once() -> None:
    with pytest.raises(TypeError, match="colour"):
        Panel(view, colour=Switch("colour")).static()
