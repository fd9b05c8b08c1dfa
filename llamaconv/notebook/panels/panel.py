"""A view that depends on choices, and the controls for them.

The static form builds no widgets: it is the view of the first choices. A notebook that runs without
a person, and an export of it, therefore show all content.

Limit: one output, drawn again at each change, so a view should take well under a second.
"""

from __future__ import annotations

import html
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ipywidgets as widgets

from llamaconv.notebook.panels.output import LIVE, SAID, PanelOutput
from llamaconv.notebook.panels.output import HasHtml as HasHtml
from llamaconv.report.errors import FailedError, LlamaconvError


@dataclass(frozen=True)
class Choice:
    """A choice among several options.

    Attributes:
        label: The text next to the control.
        options: Values, or pairs of a text and its value.
        value: The first choice.
    """

    label: str
    options: Sequence[Any]
    value: Any

    def widget(self) -> Any:
        """Return the ipywidget."""
        return widgets.Dropdown(options=list(self.options), value=self.value, **_look(self.label))


@dataclass(frozen=True)
class Slider:
    """A whole number from ``lowest`` to ``highest``, both included."""

    label: str
    lowest: int
    highest: int
    value: int

    def widget(self) -> Any:
        """Return the ipywidget."""
        look = _look(self.label, "28em")
        return widgets.IntSlider(self.value, min=self.lowest, max=self.highest, **look)


@dataclass(frozen=True)
class Text:
    """A line of text, which counts once it is entered."""

    label: str
    value: str = ""
    placeholder: str = ""

    def widget(self) -> Any:
        """Return the ipywidget."""
        look = _look(self.label) | {"placeholder": self.placeholder}
        return widgets.Text(self.value, continuous_update=False, **look)


@dataclass(frozen=True)
class Switch:
    """On or off."""

    label: str
    value: bool = False

    def widget(self) -> Any:
        """Return the ipywidget."""
        return widgets.Checkbox(self.value, indent=False, description=self.label)


Control = Choice | Slider | Text | Switch


def _look(label: str, width: str = "16em") -> dict[str, Any]:
    return {
        "description": label,
        "style": {"description_width": "initial"},
        "layout": widgets.Layout(width="auto", min_width=width),
    }


@dataclass(frozen=True)
class Offer:
    """What a control has for the present choice of the others.

    Attributes:
        options: The options of a `Choice`; None for all of its own.
        highest: The end of a `Slider`; None for its own.
        off: Why the control has no meaning now; empty if it has.
        instead: What a `Choice` shows while it is off.
    """

    options: Sequence[Any] | None = None
    highest: int | None = None
    off: str = ""
    instead: str = ""


def everything(**_values: Any) -> dict[str, Offer]:
    """Offer everything, whatever is chosen."""
    return {}


class Panel:
    """A view with its controls.

    Attributes:
        view: Takes the controls' values by name and returns what to show.
        offers: Takes the same, and returns an `Offer` for each control that depends on the others.
        controls: The controls by name.
        widgets: Their ipywidgets, once `widget` has built them.
        output: The ipywidget that shows the view, or None.
    """

    def __init__(
        self,
        view: Callable[..., HasHtml],
        offers: Callable[..., Mapping[str, Offer]] = everything,
        **controls: Control,
    ) -> None:
        self.view = view
        self.offers = offers
        self.controls: Mapping[str, Control] = controls
        self.widgets: dict[str, Any] = {}
        self.output: Any = None
        self._parts: PanelOutput | None = None
        # The values of controls that are off: they come back with their meaning.
        self._kept: dict[str, Any] = {}
        # A thread may draw too.
        self._drawing = threading.RLock()
        self._is_drawing = False

    def static(self) -> HasHtml:
        """Return the view of the first choices, without widgets."""
        return self.view(**{name: control.value for name, control in self.controls.items()})

    def show(self, interactive: bool) -> Any:
        """Return the controls over their view if ``interactive``, else the static form.

        With controls, the output has the static form too: a notebook that is opened without its
        kernel shows that.
        """
        if not interactive:
            return self.static()
        box = self.widget()
        box.add_class(LIVE)
        self._parts = PanelOutput(box, self._drawn)
        return self._parts

    def widget(self) -> Any:
        """Return a box of the controls over the view, which is drawn at once."""
        self.widgets = {name: control.widget() for name, control in self.controls.items()}
        self.output, self._off, self._said = widgets.HTML(), widgets.HTML(), widgets.HTML()
        # JupyterLab then styles tables and text like those under a cell, not like a label.
        self.output.add_class("jp-RenderedHTMLCommon")
        self._said.add_class(SAID)
        for one in self.widgets.values():
            one.observe(lambda _: self.draw(), "value")
        self.draw()
        row = widgets.HBox(list(self.widgets.values()), layout=widgets.Layout(flex_flow="row wrap"))
        return widgets.VBox([row, self._off, self.output, self._said])

    def draw(self) -> None:
        """Show the view of the controls' present values, or the error that it raises."""
        with self._drawing:
            if self._is_drawing:
                return  # a control got other options, which changed its value
            self._is_drawing = True
            try:
                self._offer()
                self._drawn = self._view_or_error(self.values())
            finally:
                self._is_drawing = False
            self.output.value = self._drawn._repr_html_()
            self._said.value = html.escape(_in_words(self._drawn))
            if self._parts is not None:
                self._parts.update(self._drawn)

    def values(self) -> dict[str, Any]:
        """Return the controls' present values, those of controls that are off included."""
        return {name: one.value for name, one in self.widgets.items()} | self._kept

    def _offer(self) -> None:
        """Give each control what it has for the present choice."""
        offers, reasons = self.offers(**self.values()), dict[str, list[str]]()
        for name, one in self.widgets.items():
            offer = offers.get(name, Offer())
            self._set(name, one, offer)
            one.disabled = bool(offer.off)
            one.tooltip = offer.off or None
            if offer.off:
                reasons.setdefault(offer.off, []).append(self.controls[name].label)
        everything_off = [self.controls[name].label for name in self.widgets]
        said = (
            f"<b>{html.escape('all controls' if names == everything_off else ', '.join(names))}"
            f"</b>: {html.escape(why)}"
            for why, names in reasons.items()
        )
        self._off.value = f"<small>Off: {'; '.join(said)}</small>" if reasons else ""

    def _set(self, name: str, one: Any, offer: Offer) -> None:
        control = self.controls[name]
        if isinstance(control, Choice):
            value = self._kept.pop(name, one.value)
            options = list(control.options if offer.options is None else offer.options)
            if offer.instead:
                self._kept[name] = value
                options = [offer.instead]
            if list(one.options) != options:
                one.options = options
            if not offer.instead and value in [_value(option) for option in options]:
                one.value = value
        elif isinstance(control, Slider):
            one.max = control.highest if offer.highest is None else offer.highest

    def _view_or_error(self, values: Mapping[str, Any]) -> HasHtml:
        try:
            return self.view(**values)
        except LlamaconvError as error:
            return error
        except OSError as error:
            # A folder may change between two cells.
            where = f"{error.filename}: " if error.filename else ""
            return FailedError(f"{where}{error.strerror or error}")


def _value(option: Any) -> Any:
    return option[1] if isinstance(option, tuple) else option


def _in_words(view: HasHtml) -> str:
    """Return what a view shows, for a line that is read aloud after each change."""
    words = getattr(view, "alt", "") or getattr(view, "caption", "") or str(view)
    return words.strip().partition("\n")[0]
