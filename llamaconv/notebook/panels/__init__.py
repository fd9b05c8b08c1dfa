"""Controls over the views of the notebooks; the only user of ipywidgets.

Without widgets a panel shows the view of its first choices. One file per notebook, imported by its
own name, so that notebooks 1 and 2 need not wait for torch.
"""

from llamaconv.notebook.panels.panel import Choice, Offer, Panel, Slider, Switch, Text

__all__ = ["Choice", "Offer", "Panel", "Slider", "Switch", "Text"]
