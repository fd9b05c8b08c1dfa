"""What a folder is: looks at names only, and says so where it is nothing that can be read."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

from llamaconv.formats import huggingface
from llamaconv.opened import Checkpoint
from llamaconv.place import matching
from llamaconv.problems import RefusedError, some
from llamaconv.remote import SAFETENSORS, HubName, is_remote, parse


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint at ``path``, a folder or a file, or ``hf://ORG/NAME[@REVISION]``.

    Only headers are read. A Hugging Face folder opens without torch, and so does a repository,
    at one commit and with huggingface_hub. Raises `RefusedError` where there is no checkpoint;
    what is wrong inside one is in its ``problems``.
    """
    if is_remote(path):
        return _open_repository(parse(str(path)))
    return _open_here(Path(path)).remembered()


def _open_here(path: Path) -> Checkpoint:
    if not path.exists():
        raise RefusedError(f"{path}: is not there")
    if path.is_file():
        if path.name.endswith((".safetensors", ".safetensors.index.json")):
            return huggingface.open_folder(path)
        if path.suffix == ".bin":
            return huggingface.open_folder(path)
        raise RefusedError(f"{path}: is neither a folder nor a .safetensors or .bin file")
    if not path.is_dir():
        raise RefusedError(f"{path}: is neither a folder nor a file")
    names = {entry.name for entry in path.iterdir()}
    if ".metadata" in names:
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


def _open_repository(name: HubName) -> Checkpoint:
    # Nothing that lies here waits for what asks the Hub.
    from llamaconv.formats import hub

    repository = hub.connect(name)
    weights = matching(repository, "*.safetensors")
    if weights or repository.is_file(huggingface.INDEX):
        beside = [name for name in huggingface.JSON_FILES if repository.is_file(name)]
        repository.fetch(weights, beside)
        return huggingface.open_place(repository)
    pinned = HubName(name.repo, repository.commit)
    for kind, (files, patterns) in _ONLY_HERE.items():
        found = [file for file in repository.files if any(fnmatchcase(file, f) for f in files)]
        if found:
            raise RefusedError(
                f"{repository.path}: holds {kind} ({some(found, 2)}); from the Hub only headers "
                f"of safetensors are read. Download it: {pinned.download(patterns)}"
            )
    raise RefusedError(f"{repository.path}: {_not_a_checkpoint(set(repository.names()))}")


_BESIDE = [pattern for pattern in SAFETENSORS if "safetensors" not in pattern]
# What a repository may hold that opens from a folder only: its files, and what to download.
_ONLY_HERE = {
    "a distributed checkpoint": ([".metadata"], [".metadata", "*.distcp", *_BESIDE]),
    "weights of torch.save": (["pytorch_model*.bin"], ["pytorch_model*", *_BESIDE]),
    "Meta's original files": (
        ["consolidated.*.pth", "original/consolidated.*.pth"],
        ["original/*", "consolidated.*.pth", *_BESIDE],
    ),
}


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
