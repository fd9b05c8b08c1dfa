"""What to run with a finished target: train it, load it, or check it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from llamaconv.checkpoint.address import copy_command
from llamaconv.checkpoint.store_address import StoreAddress
from llamaconv.plan.plan import Plan
from llamaconv.plan.small_files import names_in
from llamaconv.plan.trainer_moves import not_loaded
from llamaconv.report import shell
from llamaconv.report.errors import first_few, printable
from llamaconv.torchtitan.advice import Advice, Resumed, advise

_STEP = re.compile(r"step-[0-9]{1,18}")


def step_name(plan: Plan) -> str:
    """Return how TorchTitan names the folder of the step that is converted."""
    name = plan.source.folder.name
    return name if _STEP.fullmatch(name) else "step-N"


def dump_of(target: Path) -> Path | None:
    """Return the dump folder of TorchTitan that holds ``target`` as one of its steps, by its name."""
    is_step = target.parent.name == "checkpoint" and _STEP.fullmatch(target.name)
    return target.parent.parent if is_step else None


def next_steps(plan: Plan, target: Path | StoreAddress, dump: Path | None) -> Advice:
    """Return what to run with a finished target.

    Args:
        plan: The conversion.
        target: Where it was written.
        dump: The dump folder of TorchTitan that holds ``target`` as one of its steps, if one does.
    """
    params, _ = plan.ready()
    if plan.target.format == "dcp":
        source = plan.source.folder if plan.source_trains else None
        # From the Hub, the small files are in the target.
        assets = plan.assets
        if plan.source.remote and assets is None and isinstance(target, Path):
            assets = target
        advice = advise(
            params,
            plan.target.generation,
            plan.target.layout,
            target,
            dump,
            assets=assets,
            huggingface=source if isinstance(source, Path) else None,
            resumed=_resumed(plan, target, dump) if plan.target.with_optimizer else None,
            biases=plan.biases,
        )
        return replace(advice, notes=(*advice.notes, *_small_files(plan)))
    if plan.target.format == "meta":
        words = ["llamaconv", "verify", str(plan.source.path), str(target)]
        return Advice("Meta's files", "", shell.join(words), "", ())
    # Transformers reads local folders.
    copy, name = "", str(target)
    if isinstance(target, StoreAddress):
        copy, name = f"{copy_command(target)} && ", target.name
    # In double quotes, which a shell's single quotes leave as they are.
    load = f"AutoModelForCausalLM.from_pretrained({json.dumps(name, ensure_ascii=False)})"
    command = (
        copy + f"python -c {shell.quote(f'from transformers import AutoModelForCausalLM; {load}')}"
    )
    return Advice("transformers", "", command, "", ())


def _resumed(plan: Plan, target: Path | StoreAddress, dump: Path | None) -> Resumed:
    keys = {name.split(".", maxsplit=1)[0] for name in plan.trainer_state}
    later = []
    if dump is not None and isinstance(target, Path) and target.parent.is_dir():
        steps = (one.name for one in target.parent.iterdir() if _STEP.fullmatch(one.name))
        later = [name for name in steps if _number(name) > _number(target.name)]
    without = not_loaded(plan.source, plan.target, keys)
    return Resumed(target.name, without, tuple(sorted(later, key=_number)))


def _number(step: str) -> int:
    return int(step.removeprefix("step-"))


def _small_files(plan: Plan) -> Iterator[str]:
    """Yield a note about the files that a DCP has no place for."""
    if plan.assets and (names := names_in(plan.assets)):
        yield printable(
            f"not in the checkpoint, but in the folder {plan.assets.name}: {first_few(names, 12)}. "
            "A conversion back takes them from there"
        )
