"""A run that moved to another release goes on there as it would have gone on where it was.

The idea: TorchTitan trains five steps and keeps all of its second; that is moved with --with-optimizer,
and TorchTitan goes on from it, with its own loader, optimizer, scheduler and, within a release, data
loader. Between releases, which keep the data's position in other forms, the run goes on with the batches
of the other. The losses are those of the run that was never stopped. The limit: a small model, one
process, fp32, a CPU; titan-main was moved through, not run, since no release has it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_side import KINDS
from titan_env import RELEASES, Titan, convert
from titan_training import FLAGS, KIND, OWN_FLAGS, write_corpus
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

STEPS, KEPT = 5, 2
LIMIT = 1e-5  # in nats a token, between two releases that sum in other orders
FAR = 100 * LIMIT
# Each release's stock model has a schedule of its own.
SCHEDULE = ("--lr_scheduler.decay_ratio", "0.8", "--lr_scheduler.min_lr_factor", "0.0")
Steps = list[dict[str, Any]]
Whole = dict[str, tuple[Path, Steps]]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Long enough not to begin anew within five steps: 0.3.0 would start its positions there again.
    return write_corpus(tmp_path_factory.mktemp("corpus"), rows=16)


@pytest.fixture(scope="module")
def titans(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Titan]:
    return {
        one.generation: Titan(one, one.make(), tmp_path_factory.mktemp(f"resumed-{one.version}"))
        for one in RELEASES
    }


def train(
    titan: Titan, dump: Path, corpus: Path, *more: str, batches: Steps | None = None
) -> Steps:
    """Train to step 5 from whatever is in the dump folder; the batches and losses of each step."""
    valued = FLAGS | {"--training.steps": f"{STEPS}", "--checkpoint.interval": f"{KEPT}"}
    places = (str(dump), str(corpus), str(corpus / "data"))
    valued |= dict(zip(OWN_FLAGS[titan.release.version], places, strict=True))
    flags = ["--checkpoint.enable", *(word for flag in valued.items() for word in flag)]
    flags += [*SCHEDULE, *more]
    job: dict[str, Any] = {"params": KINDS[KIND].params(), "flags": flags}
    if batches:
        job["batches"] = f"{dump}-batches.pt"
        torch.save(batches, job["batches"])
    steps: Steps = titan.run("train", job, f"train-{dump.name}")[0]
    return steps


@pytest.fixture(scope="module")
def whole(
    titans: dict[str, Titan],
    sources: dict[str, Path],
    corpus: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Whole:
    """Each release's run from the same weights: its dump folder, and its five steps."""
    found = {}
    for generation, titan in titans.items():
        dump = tmp_path_factory.mktemp("whole") / generation
        convert(sources[KIND], dump, "--generation", generation, "--as-step-0")
        found[generation] = dump, train(titan, dump, corpus)
    return found


def moved(source: Path, target: Path, assets: Path, *generations: str) -> Path:
    """The step moved through these generations, in chunks; the folder of the last."""
    for number, generation in enumerate(generations, 1):
        is_last = number == len(generations)
        new = target if is_last else target.with_name(f"{target.name}-{generation}")
        how = ["--generation", generation, "--with-optimizer", "--assets", str(assets)]
        convert(source, new, *how, "--shards", "3")
        source = new
    return target


def losses(steps: Steps) -> list[float]:
    return [step["loss"] for step in steps]


@pytest.mark.parametrize("generation", ["titan-0.2", "titan-0.3"])
def test_through_main_and_back_the_run_goes_on_equal_to_the_bit(
    titans: dict[str, Titan], whole: Whole, corpus: Path, sources: dict[str, Path], generation: str
) -> None:
    dump, steps = whole[generation]
    other = dump.with_name(f"{generation}-back")
    target = other / "checkpoint" / f"step-{KEPT}"
    start = dump / "checkpoint" / target.name
    moved(start, target, sources[KIND], "titan-main", generation)
    again = train(titans[generation], other, corpus)
    assert losses(again) == losses(steps[KEPT:])
    for one, expected in zip(again, steps[KEPT:], strict=True):
        assert torch.equal(one["input"], expected["input"]), "the data went on elsewhere"
    for number in (4, STEPS):  # everything of step 4, and the model of the last
        found, wanted = (
            tensors(folder / "checkpoint" / f"step-{number}") for folder in (other, dump)
        )
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in found)


@pytest.mark.parametrize(
    ("here", "there"), [("titan-0.2", "titan-0.3"), ("titan-0.3", "titan-0.2")]
)
def test_the_other_release_finds_the_losses_that_this_one_would_have_found(
    titans: dict[str, Titan],
    whole: Whole,
    corpus: Path,
    sources: dict[str, Path],
    here: str,
    there: str,
) -> None:
    dump, steps = whole[here]
    start = dump / "checkpoint" / f"step-{KEPT}"
    target = moved(start, dump.with_name(f"{here}-to-{there}"), sources[KIND], there)
    by_path = ["--checkpoint.initial_load_path", str(target)]
    full = ["--checkpoint.no_initial_load_model_only", "--checkpoint.exclude_from_loading"]
    rest = steps[KEPT:]
    found = train(
        *(
            titans[there],
            dump.with_name(f"{target.name}-dump"),
            corpus,
            *by_path,
            *full,
            "dataloader",
        ),
        batches=rest,
    )
    # The same weights without their optimizer, as a model alone: the steps after the first differ.
    alone = train(
        *(titans[there], dump.with_name(f"{target.name}-alone"), corpus, *by_path),
        batches=[*rest, *steps],
    )
    expected, without = losses(rest), losses(alone)[: len(rest)]
    apart = max(abs(a - b) for a, b in zip(losses(found), expected, strict=True))
    print(f"{here} to {there}: {losses(found)}, not moved {expected}, without optimizer {without}")
    assert len(found) == STEPS - KEPT and apart <= LIMIT
    assert max(abs(a - b) for a, b in zip(without, expected, strict=True)) > FAR


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a DCP, through torch's own reader."""
    entries = FileSystemReader(folder).read_metadata().state_dict_metadata
    found = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load(found, checkpoint_id=folder, no_dist=True)
    return found
