"""Random mutations of good targets: no change of meaning gets past the checks.

A mutation is caught where ``verify SRC DST`` fails or refuses, and, wherever it left the
receipt's own text alone, where ``verify DST`` does as well. One that is not caught has to have
changed nothing: that is decided by `readings`, with other people's readers.

    LLAMACONV_MUTATIONS=200 LLAMACONV_SEED=1 pytest -s -m thorough tests/verify/test_mutations.py

makes as many of each target, and others than the ordinary run; ``-s`` shows the counts.
"""

import os
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import checkpoints, mutations, readings

from llamaconv import (
    FailedError,
    RefusedError,
    Target,
    convert_checkpoint,
    make_plan,
    open_checkpoint,
    verify_checkpoint,
)
from llamaconv.checkpoint.receipt import NAME
from llamaconv.checkpoint.torch_rows import one_thread

pytestmark = pytest.mark.thorough

HOW_MANY = int(os.environ.get("LLAMACONV_MUTATIONS", "100"))
SEED = int(os.environ.get("LLAMACONV_SEED", "0"))

# 6 heads and 2 kv heads of 8; every tensor with values of its own.
TINY = replace(
    checkpoints.GQA,
    dim=48,
    n_layers=2,
    n_heads=6,
    ffn_dim=40,
    vocab_size=56,
    max_position=8,
)
TARGETS: dict[str, dict[str, Any]] = {
    "dcp": {"to": "dcp"},
    "dcp in 3 chunks": {"to": "dcp", "shards": 3, "generation": "titan-0.2"},
    "dcp, half_split": {"to": "dcp", "rope": "half_split"},
    "hf": {"to": "hf"},
    "hf in shards": {"to": "hf", "max_shard_size": 20_000},
    "meta": {"to": "meta"},
    "meta in 2 files": {"to": "meta", "shards": 2},
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Several threads only wait for each other on tensors as small as these."""
    with one_thread():
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.write_model(tmp_path_factory.mktemp("mutations") / "source", TINY)


def caught(target: Path, source: Path | None = None) -> str:
    """Return the failed checks or the exception's name; empty if all checks pass."""
    try:
        checks = verify_checkpoint(target, source=source).checks
        failed = [check.name for check in checks if not check.ok]
    except (RefusedError, FailedError) as error:
        return type(error).__name__
    return ", ".join(failed)


@pytest.mark.parametrize("kind", TARGETS)
def test_no_mutation_that_changes_the_meaning_is_passed(
    source: Path, tmp_path: Path, kind: str
) -> None:
    good, copy = tmp_path / "good", tmp_path / "copy"
    plan = make_plan(open_checkpoint(source), Target(**TARGETS[kind]))
    convert_checkpoint(plan, good)
    assert not caught(good, source)
    assert not caught(good)
    rng = random.Random(f"{SEED} {kind}")
    counts: Counter[str] = Counter()
    missed = []
    for number in range(HOW_MANY):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(good, copy)
        name, done = mutations.mutate(copy, rng)
        text = (copy / NAME).read_bytes() if (copy / NAME).exists() else None
        receipt_is_as_it_was = text == (good / NAME).read_bytes()
        by_source, alone = caught(copy, source), caught(copy)
        if by_source and (alone or not receipt_is_as_it_was):
            counts["caught"] += 1
            counts[f"by {by_source}"] += 1
            continue
        # A receipt that is gone says nothing wrong, and a target can be checked without.
        asked = [readings.weights, readings.words, *([readings.receipt] if text else [])]
        changed = [what.__name__ for what in asked if not readings.same(what, good, copy)]
        counts["changed nothing" if not changed else "MISSED"] += 1
        if changed:
            missed.append(
                f"{number}: {name}: {done}: changes the {' and '.join(changed)}; "
                f"with the source: {by_source or 'passed'}; by the receipt: {alone or 'passed'}"
            )
    print(f"seed {SEED}, {kind}: {HOW_MANY} mutations, {dict(counts)}")
    assert not missed, "\n".join([f"seed {SEED}", *missed])
