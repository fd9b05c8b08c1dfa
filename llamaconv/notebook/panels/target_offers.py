"""Which options of a target mean something for a choice, and why the others do not."""

from __future__ import annotations

from llamaconv.checkpoint.checkpoint import Checkpoint
from llamaconv.model.names import identify
from llamaconv.notebook.panels.panel import Offer
from llamaconv.plan.target import RULES, Target
from llamaconv.plan.tied_head import HEAD


def target_offers(
    source: Checkpoint, to: str, tie: str = "auto", with_optimizer: bool = False
) -> dict[str, Offer]:
    """Return an `Offer` for each option that the target's format does not have.

    Args:
        source: The checkpoint to convert.
        to: The format, as ``--to`` has it.
        tie: The present choice of that option, which can be undone.
        with_optimizer: The present choice of that option.
    """
    rules = RULES[Target(to=to, with_optimizer=with_optimizer).resolve(source).format]
    offers = {}
    for option in ("generation", "rope", "shards", "max_shard_size", "with_optimizer"):
        if option not in rules.options:
            titles = " and ".join(one.title for one in RULES.values() if option in one.options)
            offers[option] = Offer(off=f"only for {titles}", instead="—")
    if source.format != "dcp":
        offers["with_optimizer"] = Offer(off="the source has no trainer's state", instead="—")
    elif to == "auto":
        offers.pop("with_optimizer", None)
    if rules.layout:
        reason = f"{rules.title} always has {rules.layout} rows"
        offers["rope"] = Offer(off=reason, instead=rules.layout)
    if tie == "auto" and _has_own_head(source):
        offers["tie"] = Offer(off="the source has a head of its own, not tied", instead="—")
    return offers


def _has_own_head(source: Checkpoint) -> bool:
    """Return whether the head is stored and not tied, so that nothing is to be decided."""
    if source.params is None or source.params.tied:
        return False
    roles = (identify(name, source.naming) for name in source.tensors)
    return any(role and role[0].name == HEAD for role in roles)
