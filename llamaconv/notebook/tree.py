"""The tensors of a checkpoint as a tree by the parts of their names, which folds without a kernel.

Limit: of very many tensors only the first are in the tree; a search finds the others.
"""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import dataclass, field

from llamaconv.checkpoint.checkpoint import Checkpoint
from llamaconv.checkpoint.tensors import TensorInfo
from llamaconv.notebook.browse import in_order
from llamaconv.report.errors import printable, shortened
from llamaconv.report.tables import size

# A name may come from an untrusted file; no Llama's has more parts, wrappers included.
_MOST_PARTS = 12
# Found tensors are shown at once if there are at most as many.
_MOST_OPEN = 60
_LIST = "list-style:none;margin:0;padding-left:1.4em"


@dataclass(repr=False)
class Node:
    """A module, or a tensor at the end of a branch.

    Attributes:
        label: A part of a name, or several parts if there is no choice between them.
        tensor: The tensor; None for a module.
        children: What is inside, by the next part of the name.
        n_tensors: Number of tensors in it.
        n_bytes: Bytes of all of them.
    """

    label: str
    tensor: TensorInfo | None = None
    children: dict[str, Node] = field(default_factory=dict)
    n_tensors: int = 0
    n_bytes: int = 0

    def text(self) -> str:
        """Return label and contents in one line."""
        label = shortened(printable(self.label), 200)
        if self.tensor is None:
            count = f"{self.n_tensors:,} tensor{'s' if self.n_tensors != 1 else ''}"
            return f"{label} — {count}, {size(self.n_bytes)}"
        shape = " × ".join(map(str, self.tensor.shape)) or "one number"
        return f"{label} — {self.tensor.dtype}, {shape}, {size(self.n_bytes)}"

    def html(self, opened: bool) -> str:
        """Return an item of a list; modules fold, and are open if ``opened``."""
        text = html.escape(self.text())
        if self.tensor is not None:
            return f"<li>{text}</li>"
        inside = "".join(node.html(opened) for node in self.children.values())
        state = " open" if opened else ""
        return (
            f"<li><details{state}><summary>{text}</summary>"
            f'<ul style="{_LIST}">{inside}</ul></details></li>'
        )

    def lines(self, depth: int = 0) -> Iterator[str]:
        """Yield the tree as indented text."""
        yield "  " * depth + self.text()
        for node in self.children.values():
            yield from node.lines(depth + 1)


@dataclass(frozen=True, repr=False)
class Tree:
    """The tree of the tensors that a search found.

    Attributes:
        top: The nodes at the top.
        caption: How many tensors were found.
        opened: Whether modules are shown open.
    """

    top: tuple[Node, ...]
    caption: str
    opened: bool

    def __repr__(self) -> str:
        lines = [line for node in self.top for line in node.lines()]
        return "\n".join([self.caption, *lines])

    def _repr_html_(self) -> str:
        nodes = "".join(node.html(self.opened) for node in self.top)
        return f'<p>{html.escape(self.caption)}</p><ul style="{_LIST}">{nodes}</ul>'


def tree(checkpoint: Checkpoint, text: str = "", most: int = 2000) -> Tree:
    """Return the tree of the tensors whose names contain all words of ``text``, in any case.

    Args:
        checkpoint: The checkpoint.
        text: Words; empty finds every tensor.
        most: The largest number of tensors in the tree; the caption counts all.
    """
    words = text.lower().split()
    found = [
        tensor
        for tensor in in_order(checkpoint)
        if all(word in tensor.name.lower() for word in words)
    ]
    root = Node("")
    for tensor in found[:most]:
        _add(root, tensor)
    left = f", of which {most:,} are shown: search for the others" if len(found) > most else ""
    caption = f"{len(found):,} of {len(checkpoint.tensors):,} tensors{left}"
    top = tuple(_without_chains(node) for node in root.children.values())
    return Tree(top, caption, opened=bool(words) and len(found) <= _MOST_OPEN)


def _add(root: Node, tensor: TensorInfo) -> None:
    node, parts = root, tensor.name.split(".", _MOST_PARTS - 1)
    for part in parts[:-1]:
        # A module and a tensor of one name are two nodes.
        node = node.children.setdefault(f"{part}.", Node(part))
        node.n_tensors += 1
        node.n_bytes += tensor.nbytes
    node.children[parts[-1]] = Node(parts[-1], tensor, n_tensors=1, n_bytes=tensor.nbytes)


def _without_chains(node: Node) -> Node:
    """Return the node with its only child in its own line, and so on inside."""
    while len(node.children) == 1:
        (child,) = node.children.values()
        child.label = f"{node.label}.{child.label}"
        node = child
    node.children = {key: _without_chains(child) for key, child in node.children.items()}
    return node
