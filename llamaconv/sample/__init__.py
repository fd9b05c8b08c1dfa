"""The bundled sample: a small trained Llama as a Hugging Face folder, and text it has not seen.

Eight heads and two kv heads of 16, four layers of width 128, bytes for tokens. `train` made it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from llamaconv.problems import RefusedError

_HERE = Path(__file__).parent


def sample_path() -> Path:
    """The sample as installed; a Hugging Face folder, to be read only."""
    return _HERE / "tiny-llama"


def held_out_text() -> bytes:
    """Some KB of English that the sample was not trained on (PSF licence, see its folder)."""
    return (sample_path() / "held_out.txt").read_bytes()


def write_sample(folder: str | Path) -> Path:
    """Copies the sample to ``folder``. Raises `RefusedError` where there is something already."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RefusedError(f"{folder}: exists already; choose another folder")
    shutil.copytree(sample_path(), folder, dirs_exist_ok=True)
    return folder
