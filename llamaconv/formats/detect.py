"""What a folder is: looks at names only, and says so where it is nothing that can be read."""

from __future__ import annotations

from pathlib import Path

from llamaconv.formats import huggingface
from llamaconv.pieces import Checkpoint
from llamaconv.problems import RefusedError


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint at ``path``, a folder or a file, from headers only.

    A Hugging Face folder opens without torch. Raises `RefusedError` where the path holds no
    checkpoint; what is wrong inside one is in its ``problems``.
    """
    path = Path(path)
    if not path.exists():
        raise RefusedError(f"{path}: is not there")
    if path.is_file():
        if path.name.endswith((".safetensors", ".safetensors.index.json")):
            return huggingface.open_folder(path)
        if path.suffix == ".bin":
            return huggingface.open_folder(path)
        raise RefusedError(f"{path}: is neither a folder nor a .safetensors or .bin file")
    names = {entry.name for entry in path.iterdir()}
    if ".metadata" in names:
        # The only format that needs torch to open.
        from llamaconv.formats import dcp

        return dcp.open_folder(path)
    if any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names):
        return huggingface.open_folder(path)
    if any(name.startswith("pytorch_model") and ".bin" in name for name in names):
        return huggingface.open_folder(path)
    if _has_meta_files(path):
        from llamaconv.formats import meta

        return meta.open_folder(path)
    raise RefusedError(f"{path}: {_not_a_checkpoint(names)}")


def _has_meta_files(path: Path) -> bool:
    return any(any(folder.glob("consolidated.*.pth")) for folder in (path, path / "original"))


def _not_a_checkpoint(names: set[str]) -> str:
    if any(name.endswith(".distcp") for name in names):
        return (
            "has .distcp files but no .metadata: a distributed checkpoint whose saving never "
            "finished, or whose download left the hidden file out"
        )
    if "adapter_model.bin" in names or "adapter_config.json" in names:
        return "holds adapter weights (LoRA); merge the adapter first"
    found = ", ".join(sorted(names)[:6]) or "nothing"
    return f"is no checkpoint: *.safetensors or .metadata expected, {found} found"
