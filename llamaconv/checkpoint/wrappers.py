"""Report what wrappers added to the names of a checkpoint's tensors.

A tensor keeps its stored name, by which every reader finds it. `identify` looks past the wrappers.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from llamaconv.checkpoint.checkpoint import Checkpoint
from llamaconv.model.names import bare_name, unwrapped
from llamaconv.report.errors import Problem, first_few, warning


def with_wrappers_reported(checkpoint: Checkpoint) -> Checkpoint:
    """Return ``checkpoint`` with a warning about wrappers, and an error if two names are one."""
    naming = checkpoint.naming
    if naming is None:
        return checkpoint
    n_wrapped: Counter[tuple[str, ...]] = Counter()
    example = ""
    stored: dict[tuple[str, int | None], str] = {}
    twice: dict[str, str] = {}
    for name in checkpoint.tensors:
        known, added = unwrapped(name, naming)
        if known is None:
            continue
        role, layer = known
        if added:
            n_wrapped.update([tuple(dict.fromkeys(added))])
            example = example or f"{name} is read as {bare_name(name, naming)}"
        first = stored.setdefault((role.name, layer), name)
        if first != name:
            twice[first] = name
    problems = list(checkpoint.problems)
    if n_wrapped:
        parts = dict.fromkeys(part for added in n_wrapped for part in added)
        problems.append(
            warning(
                f"{checkpoint.path}: {n_wrapped.total()} names contain the parts of a wrapper "
                f"({', '.join(parts)}), which are left out ({example})"
            )
        )
    if twice:
        shown = first_few((f"{one} and {two}" for one, two in twice.items()), 2)
        problems.append(
            Problem(
                f"{checkpoint.path}: {len(twice)} tensors are stored twice, under names that differ "
                f"in their wrappers alone: {shown}. Save one of the two models",
                (*twice, *twice.values()),
            )
        )
    return replace(checkpoint, problems=tuple(problems))
