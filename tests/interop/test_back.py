"""What TorchTitan saves comes back to transformers.

The idea: after step 1 TorchTitan saves everything, optimiser and data loader too. Converted to Hugging
Face's form, that must give transformers the loss that TorchTitan itself finds in step 2, on the batch
that it drew. The limit: the weights of a small model, after one step.
"""

from pathlib import Path

from hf_side import loss
from titan_env import Titan, convert
from titan_training import KIND, Training

LIMIT = 1e-4  # in nats a token
FAR = 100 * LIMIT


def test_what_titan_saved_after_a_step_comes_back_to_transformers(
    titan: Titan, trainings: dict[str, Training], sources: dict[str, Path], tmp_path: Path
) -> None:
    training, back = trainings["interleaved"], tmp_path / "back"
    saved = training.dump / "checkpoint" / "step-1"
    convert(saved, back, "--to", "hf", "--assets", str(sources[KIND]))
    second = training.steps[1]
    found, before = loss(back, second), loss(sources[KIND], second)
    print(
        f"TorchTitan {titan.release.version}, step 2: loss {second['loss']:.6f}, transformers on "
        f"step-1 brought back {found:.6f}, on the source {before:.6f}"
    )
    assert abs(found - second["loss"]) <= LIMIT
    assert abs(before - second["loss"]) > FAR, "the step changed nothing, so this shows nothing"
