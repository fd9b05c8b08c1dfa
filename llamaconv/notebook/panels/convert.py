"""The panel of notebook 4: a control for every target option, the headless commands, buttons.

The view is a real plan of the present choice, and the button executes that very plan in a thread.
The button is disabled while the choice has errors, so that no state of the controls fails later.
While it converts, the controls are off: what is shown is what is converted.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets

from llamaconv.checkpoint.checkpoint import Checkpoint
from llamaconv.checkpoint.store_address import StoreAddress
from llamaconv.notebook.background import CANCELLED, Work, as_llamaconv_error
from llamaconv.notebook.panels.chosen import Chosen, choose, in_words, is_there
from llamaconv.notebook.panels.panel import Choice, Offer, Panel, Switch, Text
from llamaconv.notebook.panels.target_offers import target_offers
from llamaconv.notebook.parameters import Parameters
from llamaconv.notebook.words import Words
from llamaconv.plan.plan import Plan
from llamaconv.plan.target import CHOICES, Target
from llamaconv.report.boxes import box
from llamaconv.report.errors import FailedError, LlamaconvError, RefusedError, notes

if TYPE_CHECKING:
    from llamaconv.convert.convert import Conversion
    from llamaconv.report.progress import Progress

_STEPS = ("write", "verify")
_DRAW_SECONDS = 0.25


class ConvertPanel(Panel):
    """Controls for one conversion.

    Attributes:
        checkpoint: The source.
        parameters: The first choice.
        chosen: The present choice.
        done: The last conversion, or None.
        work: The conversion that runs, or ran last; None before the first.
        button: The ipywidget of the button, or None.
        cancel: The ipywidget of the button that ends a conversion early, or None.
        status: The ipywidget of the line next to the buttons, or None.
    """

    def __init__(self, checkpoint: Checkpoint, parameters: Parameters) -> None:
        self.checkpoint = checkpoint
        self.parameters = parameters
        self.done: Conversion | None = None
        self.work: Work[Conversion] | None = None
        self._work_for: Parameters | None = None
        self.button: Any = None
        self.cancel: Any = None
        self.status: Any = None
        values = parameters.values
        super().__init__(
            self._choose,
            self._offers,
            target=Text("target", values["target"], str(parameters.destination)),
            **{name: Choice(name, options, values[name]) for name, options in CHOICES.items()},
            shards=Text("shards", str(values["shards"])),
            max_shard_size=Text("max_shard_size", values["max_shard_size"]),
            assets=Text("assets", values["assets"], "the source"),
            with_optimizer=Switch("with_optimizer", values["with_optimizer"]),
            overwrite=Switch("overwrite", values["overwrite"]),
        )
        self.chosen = choose(checkpoint, parameters)

    @property
    def _words(self) -> Words:
        return Words(self.controls, controls=bool(self.widgets))

    def _offers(
        self, *, to: str, tie: str, with_optimizer: bool, **_others: Any
    ) -> dict[str, Offer]:
        offers = target_offers(self.checkpoint, to, tie, with_optimizer)
        if not self._is_running:
            return offers
        return {
            name: replace(offers.get(name, Offer()), off="a conversion is running")
            for name in self.controls
        }

    def _choose(self, **values: Any) -> Chosen:
        # An option that means nothing is not part of the choice, nor of its commands.
        given = (values[name] for name in ("to", "tie", "with_optimizer"))
        for name in target_offers(self.checkpoint, *given):
            default = getattr(Target(), name)
            values[name] = "5GB" if name == "max_shard_size" else default
        chosen = choose(self.checkpoint, self.parameters, **values)
        self.chosen = in_words(replace(chosen, status=self._status_of(chosen)), self._words)
        if self._is_running:
            self.chosen = replace(self.chosen, problems=())
        elif done := self._conversion():
            # Its target exists now, which is not a problem.
            self.chosen = replace(self.chosen, plan=done.plan, problems=())
        return self.chosen

    @property
    def _is_running(self) -> bool:
        return self.work is not None and self.work.is_running

    def _conversion(self) -> Conversion | None:
        """Return the conversion of the present choice, if it is done and its target still exists."""
        if self._work_for != self.chosen.parameters or self.work is None or self.work.is_running:
            return None
        done = self.work.result
        return done if done and is_there(done.target) else None

    def _status_of(self, chosen: Chosen) -> str:
        """Return a box about the conversion of this choice, as HTML; empty if there was none."""
        if self.work is None or self._work_for != chosen.parameters or self.work.is_running:
            return ""
        if error := self.work.error:
            said = self._words.error(as_llamaconv_error(error))
            if self.work.was_cancelled:
                return box("warning", [CANCELLED, *notes(said)])
            return said._repr_html_()
        target = chosen.parameters.destination
        if is_there(target):
            return box("done", [f"{target}: done, every check passed"])
        return box(
            "warning", [f"{target}: converted before, but no longer exists. Convert it again"]
        )

    @property
    def plan(self) -> Plan:
        """The plan of the present choice.

        Raises:
            RefusedError: The options make no plan.
        """
        if self.chosen.plan is None:
            raise self._words.error(RefusedError(self.chosen.errors))
        return self.chosen.plan

    @property
    def target(self) -> Path | StoreAddress:
        """The folder of the last conversion, or of the present choice."""
        return self.done.target if self.done else self.chosen.parameters.destination

    def widget(self) -> Any:
        """Return the controls, the view, and the buttons with their progress."""
        self.button = widgets.Button(description="Convert", button_style="primary", icon="play")
        self.cancel = widgets.Button(description="Cancel", icon="stop", disabled=True)
        self._bar = widgets.IntProgress(max=1000, layout=widgets.Layout(visibility="hidden"))
        self.status = widgets.HTML()
        self._last_drawn = 0.0
        self.button.on_click(lambda _: self._clicked())
        self.cancel.on_click(lambda _: self._cancelled())
        panel = super().widget()
        look = widgets.Layout(flex_flow="row wrap", align_items="center")
        row = widgets.HBox([self.button, self.cancel, self._bar, self.status], layout=look)
        return widgets.VBox([*panel.children, row])

    def draw(self) -> None:
        """Show the view, and disable the button if there is nothing to convert."""
        super().draw()
        self.widgets["target"].placeholder = str(self.chosen.parameters.default_target)
        running = self._is_running
        self.button.disabled = bool(running or self.chosen.errors or self._conversion())
        self.button.tooltip = self._why_disabled(running)
        self.cancel.disabled = not running
        self._bar.layout.visibility = "visible" if running else "hidden"
        if not running:
            self.status.value = ""

    def _why_disabled(self, running: bool) -> str:
        if running:
            return "a conversion is running"
        if self.chosen.errors:
            return "the errors above come first"
        return "done: the target exists" if self._conversion() else ""

    def _clicked(self) -> None:
        # The folder may have changed since the view was drawn.
        self.draw()
        if not self.button.disabled:
            self._start()

    def _cancelled(self) -> None:
        if self.work is not None:
            self.work.cancel()
            self.cancel.disabled = True
            self.status.value = "cancelling"

    def _start(self, listener: Progress | None = None) -> Work[Conversion]:
        plan, chosen = self.plan, self.chosen.parameters

        def run(progress: Progress) -> Conversion:
            # Imported late: a plan alone does not wait for torch.
            from llamaconv.convert.convert import convert_checkpoint

            return convert_checkpoint(
                plan, chosen.destination, overwrite=chosen.may_replace, progress=progress
            )

        self._work_for = chosen
        self.work = Work(run, _STEPS, self._changed)
        self.work.start(listener)
        if self.widgets:
            self.draw()
        return self.work

    def _changed(self) -> None:
        """Follow the work; called from its threads."""
        work = self.work
        assert work is not None
        if not work.is_running:
            self.done = work.result or self.done
            if self.widgets:
                self.draw()
        elif self.widgets and time.monotonic() - self._last_drawn >= _DRAW_SECONDS:
            self._last_drawn = time.monotonic()
            self._bar.value = int(1000 * work.meter.share)
            self.status.value = "cancelling" if work.is_cancelling else work.meter.words

    def convert(self, progress: Progress | None = None) -> Conversion:
        """Execute the plan of the present choice, and wait until it is done.

        Waits for the conversion that the button has started, if it runs, and starts none if this
        choice is done. An interruption of the kernel ends a conversion that was started here.

        Args:
            progress: As for `convert_checkpoint`.

        Returns:
            The conversion, with its verification.

        Raises:
            RefusedError: The choice has errors; lists all of them.
            FailedError: The conversion or a check failed, or it was cancelled.
        """
        if done := self._conversion():
            return done
        before = self.work
        started_here = not self._is_running
        if started_here:
            self._look_again()
            if self.chosen.errors:
                raise self._words.error(RefusedError(self.chosen.errors))
        try:
            if started_here:
                return self._start(progress).wait()
            assert before is not None
            if progress is not None:
                before.also_tell(progress)
            return before.wait()
        except KeyboardInterrupt:
            work = self.work
            if work is None or work is before:
                raise
            work.cancel()
            work.end()
            if work.result:
                return work.result
            raise self._words.error(as_llamaconv_error(work.error or KeyboardInterrupt())) from None
        except LlamaconvError as error:
            raise self._words.error(error) from None

    def _look_again(self) -> None:
        """Plan the present choice again: folders may have changed since."""
        if self.widgets:
            self.draw()
        else:
            self._choose(**{name: one.value for name, one in self.controls.items()})

    def raise_if_gone(self) -> None:
        """Check that the target of the last conversion is still there.

        Raises:
            FailedError: Nothing was converted, or the target was deleted since.
        """
        if not is_there(self.target, ask=True):
            reason = "deleted after the conversion" if self.done else "nothing was converted"
            raise FailedError(f"{self.target}: not found, {reason}. Run the conversion again")
