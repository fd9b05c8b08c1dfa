"""One server, one browser and a copy of the notebooks for the whole suite."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import Lab, chromium, server

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Pictures go to LLAMACONV_SCREENSHOTS, or to a temporary folder that is named at the end."""
    home = tmp_path_factory.mktemp("lab")
    folder = home / "notebooks"
    shutil.copytree(
        NOTEBOOKS, folder, ignore=shutil.ignore_patterns("converted", "*.py", "*.css", "*.html")
    )
    pictures = Path(os.environ.get("LLAMACONV_SCREENSHOTS") or home / "screenshots")
    pictures.mkdir(parents=True, exist_ok=True)
    with server(folder, home) as address, chromium() as browser:
        yield Lab(browser, address, folder, pictures)
    print(f"screenshots: {pictures}")
