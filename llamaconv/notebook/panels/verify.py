"""The panel of notebook 5: the bits of each tensor."""

from __future__ import annotations

from llamaconv.notebook.panels.panel import Panel, Switch, Text
from llamaconv.verify.results import Verification


def tensors(verification: Verification) -> Panel:
    """Return one row per tensor; choose part of the name, or only tensors that differ."""
    return Panel(
        lambda text, only_different: verification.tensor_table(text, only_different),
        text=Text("name contains", placeholder="wq"),
        only_different=Switch("only those that differ"),
    )
