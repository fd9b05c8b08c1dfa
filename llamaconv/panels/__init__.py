"""Controls that hold a choice and call a figure; the only user of ipywidgets.

A panel shows the same without widgets: what its first choice shows. One file a notebook.
"""

from llamaconv.panels.panel import Choice, Panel, Slider, Switch, Text

__all__ = ["Choice", "Panel", "Slider", "Switch", "Text"]
