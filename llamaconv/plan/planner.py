"""Make a plan: sort every source tensor into one class, decide its move, find every problem.

Only headers are read, without torch, except where a decision depends on weights: biases that a
target cannot hold, a tied head that is also stored, and norms that look untrained.
"""

from __future__ import annotations

from dataclasses import replace

from llamaconv.checkpoint.checkpoint import Checkpoint
from llamaconv.checkpoint.fused import split_fused
from llamaconv.checkpoint.tensors import WEIGHT_DTYPES
from llamaconv.model.config_json import NOT_CARRIED
from llamaconv.plan.assets import Assets, find_assets
from llamaconv.plan.biases import check_flags
from llamaconv.plan.checking import check_dtype, check_joined, check_layout, check_tensors
from llamaconv.plan.moving import Mover, drop
from llamaconv.plan.plan import Plan
from llamaconv.plan.small_files import SmallFiles
from llamaconv.plan.sorting import sort_tensors
from llamaconv.plan.target import Target
from llamaconv.plan.trainer_moves import TrainerMoves, plan_trainer_state
from llamaconv.report.errors import Problem, explained


def make_plan(source: Checkpoint, target: Target | None = None) -> Plan:
    """Return the plan of a conversion. Problems of the checkpoint are in it, never raised.

    Args:
        source: An opened checkpoint.
        target: What to create; by default a DCP, and from a DCP a Hugging Face folder.
    """
    target = (target or Target()).resolve(source)
    return _planned(find_assets(source, target), target)


def with_header_errors(source: Checkpoint) -> Checkpoint:
    """Return ``source`` with every error in its tensors that headers show, whatever the target.

    That no file has the parameters is not an error yet, nor is what only some target cannot hold.
    """
    # Hugging Face's format holds whatever a Llama has, and an untied head is not compared.
    assets = Assets(split_fused(source), None, None, {}, SmallFiles({}, []))
    plan = _planned(assets, Target(to="hf", tie="untie"))
    # A single file of several lacks what the others have.
    lacking = set() if source.path == source.folder else set(plan.missing)
    errors = [one for one in plan.errors if not one.names or not lacking.issuperset(one.names)]
    known = [one for one in source.problems if one.level == "warning" or one in errors]
    return replace(source, problems=(*known, *(one for one in errors if one not in known)))


def _planned(assets: Assets, target: Target) -> Plan:
    source = assets.source
    target = target.resolve(source)
    found = sort_tensors(source)
    moves = [drop(tensor, reason) for tensor, reason in found.needless]
    # config.json and the tensors say the same: weights are quantised.
    stated = [one for one in source.errors if not {*one.names}.isdisjoint(NOT_CARRIED)]
    problems = [one for one in source.problems if not (found.is_quantised and one in stated)]
    problems += found.problems
    params, missing = source.params, []
    if params is not None:
        mover = Mover(source, target, params, found.known, problems)
        params, missing = mover.params, mover.missing
        moves += mover.moves
        accounted = explained(problems)
        unexplained = {
            place: tensor
            for place, tensor in found.known.items()
            # The shapes of another family's model follow from what it is.
            if tensor.name not in accounted
            and not found.is_another_model
            and not (stated and tensor.dtype not in WEIGHT_DTYPES)
        }
        problems += mover.problems
        problems += check_tensors(source, target, unexplained, params)
    config = assets.config or (source.config if source.format == "huggingface" else None)
    if config is not None:
        problems += check_flags(config, found.known, target, params)
        problems += check_dtype(config, moves, target)
    problems += check_joined(moves)
    trainer = TrainerMoves()
    if target.with_optimizer and not any(problem.level == "error" for problem in problems):
        trainer = plan_trainer_state(source, target, params)
        problems += trainer.problems
        source = trainer.source or source
    is_done = bool(moves) and all(
        move.operation == "copy" and move.source == move.target for move in (*moves, *trainer.moves)
    )
    if is_done and source.format == target.format == "dcp" and target.shards == 1:
        problems.append(
            Problem(
                f"{source.path}: is {target}, {source.rope} rows already; there is nothing to "
                "convert. Choose another --to, --generation, --rope, --dtype or --shards"
            )
        )
    if target.format == "dcp" and params is not None:
        problems += check_layout(params, target)
    return Plan(
        source=source,
        target=target,
        params=params,
        moves=tuple(moves),
        problems=tuple(problems),
        unknown=tuple(found.unknown),
        missing=tuple(missing),
        config=assets.config,
        assets=assets.folder,
        further=assets.further,
        small_files=assets.files.copied,
        state_moves=tuple(trainer.moves),
        values=tuple(trainer.values),
    )
