"""TorchTitan trains from our step-0, beginning at the loss that transformers computes."""

import re
from pathlib import Path

import pytest
import torch
from hf_side import POSITIONS, loss
from titan_env import Titan
from titan_training import KIND, Training

LIMIT = 1e-4  # in nats a token
FAR = 100 * LIMIT


def test_the_first_loss_is_that_of_transformers(
    titan: Titan, trainings: dict[str, Training], sources: dict[str, Path]
) -> None:
    training, wrong = trainings["interleaved"], trainings["half_split"]
    first = training.steps[0]
    expected = loss(sources[KIND], first)
    print(
        f"TorchTitan {titan.release.version}, step 1: loss {first['loss']:.6f}, transformers "
        f"{expected:.6f}, done wrong {wrong.steps[0]['loss']:.6f}"
    )
    assert f"Loading the checkpoint from {training.dump}/checkpoint/step-0" in training.printed
    assert abs(first["loss"] - expected) <= LIMIT
    assert torch.equal(wrong.steps[0]["input"], first["input"])
    assert abs(wrong.steps[0]["loss"] - expected) > FAR


def test_the_loss_that_titan_prints_is_the_one_that_was_noted(
    trainings: dict[str, Training],
) -> None:
    plain = re.sub(r"\x1b\[[0-9;]*m", "", trainings["interleaved"].printed)
    printed = [float(loss) for loss in re.findall(r"step: +\d+ +loss: +([\d.]+)", plain)]
    noted = [round(step["loss"], 5) for step in trainings["interleaved"].steps]
    assert printed == pytest.approx(noted, abs=2e-5)


def test_every_row_is_one_document(trainings: dict[str, Training]) -> None:
    for step in trainings["interleaved"].steps:
        assert step["input"].shape == (2, POSITIONS)
        assert torch.equal(step["input"][:, 1:], step["labels"][:, :-1])
        for positions in step.get("positions", []):
            assert torch.equal(positions, torch.arange(POSITIONS))
