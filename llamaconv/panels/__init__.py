"""Controls that hold a choice and call a figure; the only user of ipywidgets.

A panel shows the same without widgets: what its first choice shows. One file a notebook,
imported by its own name, so that a notebook which only looks does not wait for torch.
"""

from llamaconv.panels.panel import Choice, Panel, Slider, Switch, Text

__all__ = ["Choice", "Panel", "Slider", "Switch", "Text"]
