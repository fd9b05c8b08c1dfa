"""Write the small files next to the weights, and fsync them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from llamaconv.checkpoint.receipt import NAME, Receipt
from llamaconv.checkpoint.untrusted.files import open_file


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's content to a new file and fsync it. Raises ``OSError``."""
    with open_file(source) as read, target.open("xb") as written:
        shutil.copyfileobj(read, written)
        written.flush()
        os.fsync(written.fileno())


def copy_small_files(folder: Path, files: Mapping[str, Path]) -> None:
    """Copy ``files`` to their paths in ``folder``. Raises ``OSError``."""
    for name, source in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        copy_file(source, folder / name)


def write_text(target: Path, text: str) -> None:
    """Write ``text`` to a new file in UTF-8 and fsync it. Raises ``OSError``."""
    with target.open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_receipt(folder: Path, receipt: Receipt) -> None:
    """Write ``llamaconv.json`` to ``folder``."""
    text = json.dumps(receipt.to_json(), indent=1, ensure_ascii=True)
    write_text(folder / NAME, text + "\n")
