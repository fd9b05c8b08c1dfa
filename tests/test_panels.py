"""Panels driven from Python: what a person's change of a control shows."""

from pathlib import Path

import checkpoints
import pytest

from llamaconv import RefusedError, Target, open_checkpoint
from llamaconv.notebook import ConvertChoices
from llamaconv.panels import Choice, Panel, Slider, Switch, Text
from llamaconv.panels.convert import ConvertPanel
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


class TestConvertPanel:
    """Notebook 4's panel: no state of its controls fails later."""

    @pytest.fixture
    def made(self, tmp_path: Path) -> ConvertPanel:
        choices = ConvertChoices.of(
            vars(Target())
            | {"source": str(checkpoints.write(tmp_path / "hf")), "target": str(tmp_path / "out")}
            | {"max_shard_size": "5GB", "overwrite": False, "interactive": "yes"}
        )
        panel = ConvertPanel(open_checkpoint(choices.source_path), choices)
        panel.show(interactive=True)
        return panel

    @pytest.mark.parametrize(
        ("control", "wrong", "right", "words"),
        [
            ("shards", "many", "2", "shards is &#x27;many&#x27;"),
            ("shards", "0", "3", "a number from 1 to 65536"),
            ("max_shard_size", "big", "1GB", "is no size"),
            ("assets", "/nowhere", "", "no config.json"),
            ("target", "hf", "other", "source and target must not lie in each other"),
        ],
    )
    def test_the_button_is_off_while_anything_stands_against_the_choice(
        self, made: ConvertPanel, tmp_path: Path, control: str, wrong: str, right: str, words: str
    ) -> None:
        if control == "target":
            wrong, right = str(tmp_path / wrong), str(tmp_path / right)
        assert not made.button.disabled
        made.widgets[control].value = wrong
        assert made.button.disabled
        assert words in made.output.value
        made.widgets[control].value = right
        assert not made.button.disabled
        assert "error" not in made.output.value

    def test_commands_follow_the_choice_and_the_button_executes_its_plan(
        self, made: ConvertPanel, tmp_path: Path
    ) -> None:
        made.widgets["generation"].value = "titan-0.2"
        made.widgets["dtype"].value = "float32"
        assert "--generation titan-0.2 --dtype float32" in made.output.value
        assert "-p generation titan-0.2 -p dtype float32" in made.chosen.commands()
        made.button.click()
        assert made.done is not None
        assert made.done.plan is made.plan
        assert open_checkpoint(tmp_path / "out").generation == "titan-0.2"
        assert "every check passed" in made._words.value
        # The same choice again: the cell takes what the button did.
        assert made.button.disabled
        assert made.convert() is made.done
        # Another one: the target is there by now.
        made.widgets["shards"].value = "2"
        assert made.button.disabled
        assert "exists already" in made.output.value
        made.widgets["overwrite"].value = True
        assert not made.button.disabled

    def test_a_failure_under_way_is_said_beside_the_button(
        self, made: ConvertPanel, tmp_path: Path
    ) -> None:
        next((tmp_path / "hf").glob("*.safetensors")).unlink()
        made.button.click()
        assert made.done is None
        assert "failed: error" in made._words.value
        assert not (tmp_path / "out").exists()
