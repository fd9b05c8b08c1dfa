"""What the test files share: the releases, the models in Hugging Face's form, the trainings."""

from pathlib import Path

import pytest
from hf_side import KINDS, save
from titan_env import RELEASES, Titan, together
from titan_training import KIND, Training, train, write_corpus


@pytest.fixture(
    scope="session", params=RELEASES, ids=lambda release: f"torchtitan-{release.version}"
)
def titan(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Titan:
    release = request.param
    return Titan(release, release.make(), tmp_path_factory.mktemp(f"torchtitan-{release.version}"))


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Hugging Face folder of each kind of model, as transformers writes it."""
    home = tmp_path_factory.mktemp("sources")
    return {name: save(KINDS[name], home / f"{i}", seed=i) for i, name in enumerate(KINDS)}


@pytest.fixture(scope="session")
def trainings(
    titan: Titan, sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Training]:
    """Two steps from the conversion as it should be, and two from the one done wrong."""
    corpus = write_corpus(tmp_path_factory.mktemp("corpus"))
    return together(
        lambda rope: train(titan, sources[KIND], corpus, rope), ["interleaved", "half_split"]
    )
