"""The bundled model as a Hugging Face folder, and text that it was not trained on.

Four layers of width 128, eight heads and two kv heads of 16, bytes as tokens.
``tests/support/train_sample.py`` trained it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from llamaconv.report.errors import RefusedError

_HERE = Path(__file__).parent


def sample_path() -> Path:
    """Return the installed sample, a Hugging Face folder. Do not write to it."""
    return _HERE / "tiny-llama"


def held_out_text() -> bytes:
    """Return English text that the sample was not trained on (PSF licence, see its folder)."""
    return (sample_path() / "held_out.txt").read_bytes()


def write_sample(folder: str | Path) -> Path:
    """Copy the sample to ``folder``, and return that.

    Raises:
        RefusedError: The folder has content, or is not a folder.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RefusedError(f"{folder}: exists already; choose another folder")
    shutil.copytree(sample_path(), folder, dirs_exist_ok=True)
    return folder
