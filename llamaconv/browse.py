"""What a person wants to know of a checkpoint before anything is done with it, as tables.

Headers only, without torch. Nothing raises for a bad checkpoint: it is shown, problems and all.
"""

from __future__ import annotations

from collections import Counter
from math import prod
from pathlib import Path

from llamaconv import keys
from llamaconv.family import which_llama
from llamaconv.files import try_json
from llamaconv.formats import huggingface
from llamaconv.formats.safetensors_header import read_header
from llamaconv.pieces import Checkpoint, TensorInfo
from llamaconv.problems import Problem
from llamaconv.tables import Table, size

# Kinds of module in the order of a forward pass, and the roles of each.
KINDS = {
    "embedding": ("tok_embeddings",),
    "q and k": ("wq", "wk"),
    "v and o": ("wv", "wo"),
    "feed-forward": ("w1", "w2", "w3"),
    "norms": ("attention_norm", "ffn_norm", "norm"),
    "head": ("output",),
    "other": (),
}
_KIND_OF = {role: kind for kind, roles in KINDS.items() for role in roles}


def kind_of(name: str, naming: str | None) -> str:
    """One of `KINDS`; a bias is of its matrix's kind, a name of nothing known is ``other``."""
    known = keys.identify(name, naming)
    return _KIND_OF.get(known[0].name.removesuffix(".bias"), "other") if known else "other"


def layer_of(name: str, naming: str | None) -> int | None:
    known = keys.identify(name, naming)
    return known[1] if known else None


def totals(checkpoint: Checkpoint) -> Table:
    """Which Llama it is, and how much of what there is."""
    tensors = checkpoint.tensors.values()
    dtypes = Counter(tensor.dtype for tensor in tensors)
    files = {piece.file for tensor in tensors for piece in tensor.pieces}
    rows = [
        ("which Llama", which_llama(checkpoint.params)),
        ("parameters", checkpoint.params or "not known"),
        ("format", f"{checkpoint.format}, rows of q and k {checkpoint.rope or 'unknown'}"),
        ("tensors", f"{len(checkpoint.tensors):,} in {len(files)} files"),
        ("elements", f"{checkpoint.parameters:,}"),
        ("bytes", size(checkpoint.total_bytes)),
        ("dtypes", ", ".join(f"{dtype} ({n:,} tensors)" for dtype, n in dtypes.items())),
    ]
    if checkpoint.generation:
        rows.insert(3, ("key names", checkpoint.generation))
    return Table(("of the checkpoint", ""), rows)


def by_kind(checkpoint: Checkpoint) -> Table:
    """Tensors, elements and bytes of each kind of module."""
    groups: dict[str, list[TensorInfo]] = {kind: [] for kind in KINDS}
    for tensor in checkpoint.tensors.values():
        groups[kind_of(tensor.name, checkpoint.naming)].append(tensor)
    whole = max(1, checkpoint.total_bytes)
    rows = [
        (
            kind,
            len(group),
            f"{sum(prod(t.shape) for t in group):,}",
            size(n_bytes := sum(t.nbytes for t in group)),
            f"{100 * n_bytes / whole:.0f}%",
        )
        for kind, group in groups.items()
        if group
    ]
    columns = ("kind", "tensors", "elements", "bytes", "share")
    return Table(columns, rows, right=columns[1:])


def tensor_table(
    checkpoint: Checkpoint,
    kind: str = "",
    layer: int | None = None,
    file: str = "",
    dtype: str = "",
    text: str = "",
    most: int = 20,
) -> Table:
    """The tensors that fit every condition given; ``text`` is a part of the name."""
    naming = checkpoint.naming
    found = [
        tensor
        for tensor in checkpoint.tensors.values()
        if (not kind or kind_of(tensor.name, naming) == kind)
        and (layer is None or layer_of(tensor.name, naming) == layer)
        and (not file or file in tensor.files)
        and (not dtype or tensor.dtype == dtype)
        and text.lower() in tensor.name.lower()
    ]
    rows = [
        (
            tensor.name,
            kind_of(tensor.name, naming),
            tensor.dtype,
            " × ".join(map(str, tensor.shape)),
            size(tensor.nbytes),
            ", ".join(tensor.files),
        )
        for tensor in found
    ]
    columns = ("tensor", "kind", "dtype", "shape", "size", "file")
    n_bytes = size(sum(tensor.nbytes for tensor in found))
    caption = f"{len(found):,} of {len(checkpoint.tensors):,} tensors, {n_bytes}"
    return Table(columns, rows, caption=caption, right=("shape", "size"), most=most)


def index_diff(checkpoint: Checkpoint) -> Table:
    """Where the index and the headers of its shards disagree, a row a tensor."""
    columns = ("tensor", "the index says", "the headers say")
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    path = folder / huggingface.INDEX
    if not path.is_file():
        return Table(columns, [], caption="there is no index, so nothing that could disagree")
    problems: list[Problem] = []
    index = try_json(path, problems) or {}
    weight_map = index.get("weight_map")
    weight_map = weight_map if isinstance(weight_map, dict) else {}
    stored: dict[str, str] = {}
    for file in sorted(folder.glob("*.safetensors")):
        stored |= dict.fromkeys(read_header(file)[0], file.name)
    rows = [
        (name, weight_map.get(name, "nothing"), stored.get(name, "in no file that can be read"))
        for name in sorted(weight_map.keys() | stored.keys())
        if weight_map.get(name) != stored.get(name)
    ]
    metadata = index.get("metadata")
    stated = metadata.get("total_size") if isinstance(metadata, dict) else None
    if stated is not None and stated != checkpoint.total_bytes:
        rows.append(("(all)", f"{stated} bytes", f"{checkpoint.total_bytes} bytes"))
    caption = (
        f"{len(rows)} disagreements"
        if rows
        else f"index and headers agree on {len(stored):,} tensors in {len(set(stored.values()))} files"
    )
    return Table(columns, rows, caption=caption)


def ignored(checkpoint: Checkpoint) -> Table:
    """What lies there and is left out on purpose."""
    rows = [(one.name, one.reason) for one in checkpoint.ignored]
    caption = f"{len(rows)} ignored" if rows else "nothing is ignored"
    return Table(("name", "why"), rows, caption=caption)


def problems(checkpoint: Checkpoint) -> Table:
    """Everything that is wrong or worth knowing, errors first."""
    found = sorted(checkpoint.problems, key=lambda problem: problem.level)
    rows = [(problem.level, problem.message) for problem in found]
    caption = f"{len(checkpoint.errors)} errors" if rows else "no problems"
    return Table(("level", "problem"), rows, caption=caption)


def files_of(checkpoint: Checkpoint) -> dict[str, dict[str, int]]:
    """Bytes by kind of each file, in the files' order."""
    found: dict[Path, dict[str, int]] = {}
    for tensor in checkpoint.tensors.values():
        kind = kind_of(tensor.name, checkpoint.naming)
        n_elements = max(1, prod(tensor.shape))
        for piece in tensor.pieces:
            share = tensor.nbytes * prod(piece.shape) // n_elements
            kinds = found.setdefault(piece.file, {})
            kinds[kind] = kinds.get(kind, 0) + share
    return {file.name: found[file] for file in sorted(found)}
