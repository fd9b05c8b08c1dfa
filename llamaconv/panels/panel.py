"""A view that is a function of its choices, and the controls that make them.

The static form needs no widgets and builds none: it is the view of the first choices. So a
notebook that runs without a person shows all its content, and exports show it too.

Limit: one output, drawn anew at each change; a view should take well under a second.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import ipywidgets as widgets

from llamaconv.problems import LlamaconvError


class Shown(Protocol):
    """What a view returns: anything that a notebook renders as HTML."""

    def _repr_html_(self) -> str: ...


@dataclass(frozen=True)
class Choice:
    """One of several; ``options`` are values, or pairs of a text and its value."""

    label: str
    options: Sequence[Any]
    value: Any

    def widget(self) -> Any:
        return widgets.Dropdown(options=list(self.options), value=self.value, **_look(self.label))


@dataclass(frozen=True)
class Slider:
    """A whole number from ``lowest`` to ``highest``, both included."""

    label: str
    lowest: int
    highest: int
    value: int

    def widget(self) -> Any:
        return widgets.IntSlider(
            min=self.lowest, max=self.highest, value=self.value, **_look(self.label, "28em")
        )


@dataclass(frozen=True)
class Text:
    """A line of text, taken over when it is entered."""

    label: str
    value: str = ""
    placeholder: str = ""

    def widget(self) -> Any:
        return widgets.Text(
            value=self.value,
            placeholder=self.placeholder,
            continuous_update=False,
            **_look(self.label),
        )


@dataclass(frozen=True)
class Switch:
    """On or off."""

    label: str
    value: bool = False

    def widget(self) -> Any:
        return widgets.Checkbox(value=self.value, indent=False, description=self.label)


Control = Choice | Slider | Text | Switch


def _look(label: str, width: str = "16em") -> dict[str, Any]:
    return {
        "description": label,
        "style": {"description_width": "initial"},
        "layout": widgets.Layout(width="auto", min_width=width),
    }


class Panel:
    """``view`` takes the controls' values by name and returns what is shown."""

    def __init__(self, view: Callable[..., Shown], **controls: Control) -> None:
        self.view = view
        self.controls: Mapping[str, Control] = controls
        self.widgets: dict[str, Any] = {}
        self.output: Any = None

    def static(self) -> Shown:
        """What the first choices show, without a widget."""
        return self.view(**{name: control.value for name, control in self.controls.items()})

    def show(self, interactive: bool) -> Any:
        """Controls over their view where ``interactive``, else the static form."""
        return self.widget() if interactive else self.static()

    def widget(self) -> Any:
        """A box of the controls over the view of their values; drawn once at once."""
        self.widgets = {name: control.widget() for name, control in self.controls.items()}
        self.output = widgets.HTML()
        # JupyterLab then draws its tables and text as those under a cell, not as a label.
        self.output.add_class("jp-RenderedHTMLCommon")
        for one in self.widgets.values():
            one.observe(lambda change: self.draw(), "value")
        self.draw()
        row = widgets.HBox(list(self.widgets.values()), layout=widgets.Layout(flex_flow="row wrap"))
        return widgets.VBox([row, self.output])

    def draw(self) -> None:
        """Shows the view of the controls' present values; a problem is shown as one."""
        values = {name: one.value for name, one in self.widgets.items()}
        try:
            self.output.value = self.view(**values)._repr_html_()
        except LlamaconvError as error:
            self.output.value = error._repr_html_()
        except OSError as error:
            # What a folder that changes between two cells gives.
            where = f"{error.filename}: " if error.filename else ""
            self.output.value = f"<pre>error: {html.escape(where + str(error.strerror))}</pre>"
