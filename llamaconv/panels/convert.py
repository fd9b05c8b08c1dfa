"""The panel of notebook 4: a control for every target option, the headless commands, a button.

What is shown is a real plan of the present choice, and the button executes that very plan. It
stays off while anything stands against it, so that no state of the controls fails later.
"""

from __future__ import annotations

import html
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets

from llamaconv.agreement import fingerprint
from llamaconv.notebook import ConvertChoices
from llamaconv.opened import Checkpoint
from llamaconv.panels.panel import Choice, Panel, Switch, Text
from llamaconv.plan import CHOICES, Plan
from llamaconv.planner import make_plan
from llamaconv.problems import Problem, RefusedError
from llamaconv.tables import size
from llamaconv.target_check import check_target

if TYPE_CHECKING:
    from llamaconv.convert import Conversion
    from llamaconv.ranks import Progress

_NOTEBOOK = "4-convert.ipynb"


@dataclass(frozen=True, repr=False)
class Chosen:
    """One choice of every option: the plan that it makes, and what stands against it."""

    choices: ConvertChoices
    plan: Plan | None
    problems: tuple[Problem, ...]

    @property
    def errors(self) -> list[Problem]:
        return [problem for problem in self.problems if problem.level == "error"]

    def commands(self) -> str:
        """papermill and llamaconv, for exactly this choice."""
        return self.choices.headless(_NOTEBOOK, "convert")

    def __repr__(self) -> str:
        plan = [self.plan.summary()] if self.plan else []
        return "\n".join([*plan, *map(str, self.problems), self.commands()])

    def _repr_html_(self) -> str:
        parts = [RefusedError(self.problems)._repr_html_()] if self.problems else []
        if self.plan:
            parts.append(
                f"<p><b>{html.escape(self.plan.summary())}</b><br>{size(self.plan.bytes_to_read)} "
                f"to read, {size(self.plan.bytes_to_write)} to write</p>"
            )
        commands = html.escape(self.commands())
        style = "border:1px solid #8886;padding:0.6em;white-space:pre-wrap;user-select:all"
        parts.append(f'<p>Run this headless:</p><pre style="{style}">{commands}</pre>')
        return "\n".join(parts)


def choose(checkpoint: Checkpoint, choices: ConvertChoices, **changes: Any) -> Chosen:
    """What ``choices`` with some options changed make of ``checkpoint``; never raises."""
    shards = changes.get("shards", choices.shards)
    # A text field gives text; what is no number is refused with the other values.
    is_number = str(shards).isdecimal() and len(str(shards)) < 10
    changes["shards"] = int(shards) if is_number else shards
    choices = replace(choices, **changes)
    plan, problems = None, list(choices.problems())
    if not problems:
        plan = make_plan(checkpoint, choices.options())
        problems += plan.problems
        try:
            place = choices.target_path
            check_target(
                place,
                checkpoint.local_path,
                plan.bytes_to_write,
                choices.may_replace,
                fingerprint(plan),
            )
        except RefusedError as error:
            problems += error.problems
    return Chosen(choices, plan, tuple(problems))


class ConvertPanel(Panel):
    """Controls for one conversion of ``checkpoint``; ``chosen`` is the present choice."""

    def __init__(self, checkpoint: Checkpoint, choices: ConvertChoices) -> None:
        self.checkpoint = checkpoint
        self.choices = choices
        self.chosen = choose(checkpoint, choices)
        self.done: Conversion | None = None
        self._done_for: ConvertChoices | None = None
        self.button: Any = None
        offered = {
            name: Choice(name, options, getattr(choices, name)) for name, options in CHOICES.items()
        }
        super().__init__(
            self._choose,
            target=Text("target", choices.target, str(choices.target_path)),
            **offered,
            shards=Text("shards", str(choices.shards)),
            max_shard_size=Text("max_shard_size", choices.max_shard_size),
            assets=Text("assets", choices.assets, "the source"),
            overwrite=Switch("overwrite", choices.overwrite),
        )

    def _choose(self, **values: Any) -> Chosen:
        self.chosen = choose(self.checkpoint, self.choices, **values)
        if self.done is not None and self._is_done:
            # That its target exists now is no problem.
            self.chosen = replace(self.chosen, plan=self.done.plan, problems=())
        return self.chosen

    @property
    def _is_done(self) -> bool:
        return self.done is not None and self._done_for == self.chosen.choices

    @property
    def plan(self) -> Plan:
        """The plan of the present choice. Raises `RefusedError` where the options make none."""
        if self.chosen.plan is None:
            raise RefusedError(self.chosen.errors)
        return self.chosen.plan

    @property
    def target(self) -> Path:
        return self.done.target if self.done else self.chosen.choices.target_path

    def widget(self) -> Any:
        self.button = widgets.Button(description="Convert", button_style="primary", icon="play")
        self._bar = widgets.IntProgress(max=1000, layout=widgets.Layout(visibility="hidden"))
        self._words = widgets.Label()
        self.button.on_click(lambda button: self._clicked())
        box = super().widget()
        row = widgets.HBox([self.button, self._bar, self._words])
        return widgets.VBox([*box.children, row])

    def draw(self) -> None:
        super().draw()
        self.button.disabled = bool(self.chosen.errors) or self._is_done

    def _clicked(self) -> None:
        self.button.disabled = True
        self._bar.layout.visibility = "visible"
        self._began, self._drawn, self._step = time.monotonic(), 0.0, ""
        try:
            self.convert(self._progress)
            self._words.value = f"{self.target}: done, every check passed"
        except Exception as error:  # a click has no cell to show a traceback in
            self._words.value = f"failed: {error}"
        self.draw()

    def _progress(self, step: str, done: int, total: int) -> None:
        now = time.monotonic()
        if step != self._step:
            self._step, self._began = step, now
        if done < total and now - self._drawn < 0.2:
            return
        self._drawn = now
        left = (now - self._began) * (total - done) / max(1, done)
        word = {"write": "writing", "verify": "verifying"}[step]
        self._bar.value = 1000 * done // max(1, total)
        self._words.value = f"{word}: {size(done)} of {size(total)}, {left:.0f} s left"

    def convert(self, progress: Progress | None = None) -> Conversion:
        """Executes the plan of the present choice, unless the button did it already.

        Raises `RefusedError` with everything that stands against it, and what
        `convert_checkpoint` raises.
        """
        if self.done is not None and self._is_done:
            return self.done
        if self.chosen.errors:
            raise RefusedError(self.chosen.errors)
        # Not before: a plan alone does not wait for torch.
        from llamaconv.convert import convert_checkpoint

        choices = self.chosen.choices
        self.done = convert_checkpoint(
            self.plan, choices.target_path, overwrite=choices.may_replace, progress=progress
        )
        self._done_for = choices
        return self.done
