"""The small files of a target: what stands beside the weights, written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from llamaconv.files import open_file
from llamaconv.receipt import NAME, Receipt


def copy_file(source: Path, target: Path) -> None:
    """Copies a file's content, and sends it to the disk. Raises ``OSError``."""
    with open_file(source) as read, open(target, "xb") as written:
        shutil.copyfileobj(read, written)
        written.flush()
        os.fsync(written.fileno())


def write_text(target: Path, text: str) -> None:
    """A new file of ``text`` in UTF-8, on the disk. Raises ``OSError``."""
    with open(target, "x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_receipt(folder: Path, receipt: Receipt) -> None:
    """Write ``llamaconv.json`` to ``folder``."""
    text = json.dumps(receipt.to_json(), indent=1, ensure_ascii=True)
    write_text(folder / NAME, text + "\n")
