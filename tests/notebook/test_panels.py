"""Panels driven from Python: what a person's change of a control shows."""

import io
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support import checkpoints

from llamaconv import FailedError, RefusedError, Target, open_checkpoint
from llamaconv.notebook import cell_bar
from llamaconv.notebook.background import Work
from llamaconv.notebook.conversion import disk_needed, progress_bar
from llamaconv.notebook.panels import Choice, Panel, Slider, Switch, Text, output
from llamaconv.notebook.panels.convert import ConvertPanel
from llamaconv.notebook.parameters import Parameters
from llamaconv.notebook.words import Words
from llamaconv.report.errors import Problem, warning
from llamaconv.report.tables import Table


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


def test_static_form_shows_the_first_choices_without_widgets() -> None:
    made = panel()
    assert "wk  False" in str(made.show(interactive=False))
    assert made.output is None and not made.widgets


def test_output_with_controls_has_the_still_view_too(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[dict[str, str]] = []
    monkeypatch.setattr(output, "display", lambda data, **_: shown.append(data))
    panel().show(interactive=True)._ipython_display_()
    still, live = shown
    assert "wk  False" in still["text/html"] and "wk  False" in still["text/plain"]
    assert "application/vnd.jupyter.widget-view+json" in live
    assert not live["text/html"] and not live["text/plain"], "an export shows the still alone"


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
        assert made.widgets[name].description, "every control has words"
        made.widgets[name].value = value
        assert made.output.value != before
        assert expected in made.output.value


def test_error_is_shown_and_disappears_after_a_valid_choice() -> None:
    made = panel()
    made.show(interactive=True)
    made.widgets["layer"].value = 3
    assert 'role="alert"' in made.output.value
    assert "error: layer 3: &lt;b&gt;is not there" in made.output.value
    made.widgets["layer"].value = 0
    assert "error" not in made.output.value


def test_refusal_in_a_notebook_has_no_traceback() -> None:
    assert RefusedError("a\nb")._render_traceback_() == ["error: a\\nb"]


def test_unknown_name_of_a_control_is_an_error() -> None:
    with pytest.raises(TypeError, match="colour"):
        Panel(view, colour=Switch("colour")).static()


class TestConvertPanel:
    """Notebook 4's panel: no state of its controls fails later."""

    @pytest.fixture
    def made(self, tmp_path: Path) -> ConvertPanel:
        parameters = Parameters.of(
            "4-convert",
            vars(Target())
            | {"source": str(checkpoints.write(tmp_path / "hf")), "target": str(tmp_path / "out")}
            | {"max_shard_size": "5GB", "overwrite": False, "interactive": "yes"},
        )
        panel = ConvertPanel(open_checkpoint(parameters.source), parameters)
        panel.show(interactive=True)
        return panel

    @pytest.mark.parametrize(
        ("control", "wrong", "right", "words"),
        [
            ("shards", "many", "2", "parameter shards must be int; got &#x27;many&#x27;"),
            ("shards", "0", "3", "between 1 and 65536"),
            ("max_shard_size", "big", "1GB", "invalid size"),
            ("assets", "/nowhere", "", "a folder with config.json"),
            ("target", "hf", "other", "the target must not be inside the source"),
        ],
    )
    def test_button_is_disabled_while_the_choice_has_errors(
        self, made: ConvertPanel, tmp_path: Path, control: str, wrong: str, right: str, words: str
    ) -> None:
        if control == "max_shard_size":
            made.widgets["to"].value = "hf"  # a DCP has none
            made.widgets["target"].value = str(tmp_path / "other")
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
        assert "-p generation titan-0.2 -p dtype float32" in made.chosen.parameters.headless()
        made.button.click()
        made.work.end()
        assert made.done is not None
        assert made.done.plan is made.plan
        assert open_checkpoint(tmp_path / "out").generation == "titan-0.2"
        assert "✓" in made.output.value and "done, every check passed" in made.output.value
        # The same choice again: the cell takes what the button did.
        assert made.button.disabled and made.cancel.disabled
        assert made.convert() is made.done
        # Another one: the target is there by now, and the status of the first has gone.
        made.widgets["shards"].value = "2"
        assert made.button.disabled
        assert "exists already. Choose another target, or tick overwrite" in made.output.value
        assert "every check passed" not in made.output.value
        made.widgets["overwrite"].value = True
        assert not made.button.disabled

    def test_target_that_was_deleted_is_reported_and_can_be_converted_again(
        self, made: ConvertPanel, tmp_path: Path
    ) -> None:
        made.convert()
        made.raise_if_gone()
        shutil.rmtree(tmp_path / "out")
        with pytest.raises(FailedError, match="out: not found, deleted after the conversion"):
            made.raise_if_gone()
        made.draw()
        assert "no longer exists" in made.output.value
        assert "every check passed" not in made.output.value
        assert not made.button.disabled
        made.convert()
        assert (tmp_path / "out" / "llamaconv.json").is_file()

    def test_existing_target_is_refused_in_the_words_of_papermill_without_controls(
        self, made: ConvertPanel, tmp_path: Path
    ) -> None:
        shutil.copytree(tmp_path / "hf", tmp_path / "out")
        still = ConvertPanel(made.checkpoint, made.parameters)
        assert "pass -p overwrite True" in still.show(interactive=False)._repr_html_()
        with pytest.raises(RefusedError, match=r"exists already.*pass -p overwrite True"):
            still.convert()

    def test_failed_conversion_is_reported_in_full(
        self, made: ConvertPanel, tmp_path: Path
    ) -> None:
        file = next((tmp_path / "hf").glob("*.safetensors"))
        file.rename(tmp_path / "away")
        made.button.click()
        made.work.end()
        assert made.done is None
        assert "✗ error" in made.output.value and file.name in made.output.value
        assert not (tmp_path / "out").exists()
        assert made.cancel.disabled
        (tmp_path / "away").rename(file)
        made.draw()
        assert not made.button.disabled, "the panel lives"

    def test_cancelled_conversion_says_what_is_kept_and_goes_on_from_there(
        self, made: ConvertPanel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("llamaconv.convert.disk_file._JOURNAL_BYTES", 1000)
        seen: list[tuple[bool, bool]] = []

        def at_the_checks(step: str, _done: int, _total: int) -> None:
            if step == "verify" and not seen:
                seen.append((made.widgets["to"].disabled, made.button.disabled))
                made.cancel.click()

        with pytest.raises(FailedError, match="cancelled; the target was not changed"):
            made.convert(at_the_checks)
        assert seen == [(True, True)]
        assert not (tmp_path / "out").exists()
        assert "⚠ cancelled" in made.output.value
        assert "out.llamaconv-partial keeps" in made.output.value
        assert "Convert continues from there" in made.output.value
        assert not made.button.disabled and not made.widgets["to"].disabled
        made.button.click()
        made.work.end()
        assert made.done.bytes_reused > 0

    def test_cell_waits_for_the_conversion_of_the_button(self, made: ConvertPanel) -> None:
        gate, steps = threading.Event(), []
        made._start(lambda *_: gate.wait(60))
        work = made.work
        threading.Timer(0.2, gate.set).start()
        assert made.convert(lambda step, *_: steps.append(step)) is made.done
        assert made.work is work and "verify" in steps

    def test_interrupted_cell_ends_its_conversion_and_leaves_the_panel_alive(
        self, made: ConvertPanel, tmp_path: Path
    ) -> None:
        cancelled, sent, end = threading.Event(), threading.Lock(), Work.cancel

        def interrupt(*_: object) -> None:
            if sent.acquire(blocking=False):
                # Python drops what is raised while it collects garbage, so once may be too few.
                for _try in range(6):
                    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
                    if cancelled.wait(10):
                        break
            cancelled.wait(60)

        with pytest.MonkeyPatch.context() as patch, interruptible():
            patch.setattr(Work, "cancel", lambda work: (end(work), cancelled.set()))
            with pytest.raises(FailedError, match="cancelled"):
                made.convert(interrupt)
        assert not made.button.disabled and made.cancel.disabled
        assert made.convert().verification.ok

    def test_controls_without_a_meaning_are_off_and_say_why(self, made: ConvertPanel) -> None:
        off = {name for name, one in made.widgets.items() if one.disabled}
        assert off == {"max_shard_size", "tie", "with_optimizer"}
        assert "only for Hugging Face" in made.widgets["max_shard_size"].tooltip
        made.widgets["rope"].value = "half_split"
        made.widgets["to"].value = "hf"
        off = {name for name, one in made.widgets.items() if one.disabled}
        assert off == {"generation", "rope", "shards", "tie", "with_optimizer"}
        assert made.widgets["rope"].value == "half_split", "what a Hugging Face folder has"
        assert "Hugging Face always has half_split rows" in made._off.value
        assert "--rope" not in made.chosen.parameters.headless()
        made.widgets["to"].value = "dcp"
        assert made.widgets["rope"].value == "half_split" and not made.widgets["rope"].disabled
        assert "--rope half_split" in made.chosen.parameters.headless()


@contextmanager
def interruptible() -> Iterator[None]:
    """As in a kernel, each SIGINT interrupts; the command line, run here before, ignores a second."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def test_warnings_and_errors_look_different() -> None:
    both = RefusedError([Problem("wrong"), warning("odd")])._repr_html_()
    error, odd = both.splitlines()
    assert "✗ error: wrong" in error and 'role="alert"' in error
    assert "⚠ warning: odd" in odd and 'role="status"' in odd


@pytest.mark.parametrize(
    ("text", "control", "parameter"),
    [
        ("a: exists. Pass b, or pass --overwrite", "tick overwrite", "pass -p overwrite True"),
        ("--overwrite replaces only", "overwrite replaces only", "overwrite replaces only"),
        ("choose --tie head, or leave", "choose tie = head, or leave", "choose -p tie head, or"),
        ("its folder with --assets", "its folder with assets", "its folder with -p assets"),
        ("above --max-shard-size.", "above max_shard_size.", "above -p max_shard_size."),
        ("fewer --workers", "fewer --workers", "fewer --workers"),
    ],
)
def test_messages_call_options_what_the_place_calls_them(
    text: str, control: str, parameter: str
) -> None:
    names = ("overwrite", "tie", "assets", "max_shard_size")
    assert control in Words(names, controls=True).text(text)
    assert parameter in Words(names, controls=False).text(text)


def test_bar_of_a_cell_is_drawn_in_place_and_says_which_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown: list[str] = []

    class Handle:
        def update(self, bundle: dict[str, str], raw: bool) -> None:
            shown[-1] = bundle["text/html"]

    def display(bundle: dict[str, str], **_: object) -> Handle:
        shown.append(bundle["text/html"])
        return Handle()

    monkeypatch.setattr(cell_bar, "display", display)
    monkeypatch.setattr(cell_bar, "_DRAW_SECONDS", 0)
    monkeypatch.setenv("JPY_SESSION_NAME", "notebook")
    with progress_bar() as bar:
        for done in range(50):
            bar("write", done, 50)
        bar("verify", 10, 50)
        assert len(shown) == 1 and "2 of 2, verifying: 10 B of 50 B" in shown[0]
        assert 'value="0.600"' in shown[0]
    assert len(shown) == 1 and "writing and verifying: done in" in shown[0]


def test_bar_of_a_cell_without_a_person_writes_few_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    stream = io.StringIO()
    with cell_bar.CellBar(("write", "verify"), stream) as bar:
        for done in range(1000):
            bar("write", done, 1000)
        assert not stream.getvalue(), "a short run writes nothing that depends on the machine"
        bar._last -= 10
        bar("verify", 7, 1000)
    assert stream.getvalue() == "2 of 2, verifying: 7 B of 1 kB\n"


def test_notebook_5_says_before_how_much_disk_it_needs(tmp_path: Path) -> None:
    source = checkpoints.write(tmp_path / "hf")
    rows = dict(disk_needed(source, tmp_path / "out").rows)
    assert rows["the target"] == rows["the round trip, deleted after it"] == "712 kB"
    assert rows["enough"] == "yes"
    assert dict(disk_needed(source, source).rows)["the target"] == "exists already"
