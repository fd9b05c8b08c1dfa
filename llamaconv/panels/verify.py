"""The panel of notebook 5: the bits of each tensor."""

from __future__ import annotations

from llamaconv.checks import Verification
from llamaconv.panels.panel import Panel, Switch, Text


def tensors(verification: Verification) -> Panel:
    """A row a tensor; choose a part of the name, or only those that differ."""
    return Panel(
        lambda text, only_different: verification.tensor_table(text, only_different),
        text=Text("name contains", placeholder="wq"),
        only_different=Switch("only those that differ"),
    )
