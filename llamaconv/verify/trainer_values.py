"""Check that what is no tensor in a trainer's state was copied as it lay, by torch's own index.

Torch's metadata says where each entry of both sides is; their bytes are compared and never unpickled. What the source does
not have, and the plan made, is loaded by torch and compared by its value.
"""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from llamaconv.checkpoint.trainer_state import MadeValue, StoredValue
from llamaconv.plan.plan import Plan
from llamaconv.report.errors import first_few
from llamaconv.verify.results import Check
from llamaconv.verify.torch_metadata import unpickle_metadata

NAME = "trainer's values"


def check_values(plan: Plan, folder: Path) -> Check:
    """Compare every value of ``plan`` with its source; the control is each with the one before it.

    Args:
        plan: The conversion, without errors, both sides of which `dcp_metadata` has read.
        folder: The target.
    """
    here, there = _Values(plan.source.local_path), _Values(folder)
    wrong, mixed_up, before = [], 0, ""
    for copy in plan.values:
        found = there.digest(copy.target)
        if isinstance(copy.source, MadeValue):
            is_same = there.load(copy.target) == copy.source.value
        else:
            is_same = found == here.digest(copy.source.name)
        if not (found and is_same):
            wrong.append(copy.target)
        mixed_up += found != before
        before = found
    expected = {copy.target for copy in plan.values}
    wrong += sorted(there.names - expected)
    detail = f"all {len(plan.values)} have the source's bytes"
    if wrong:
        detail = f"{len(wrong)} entries differ from the source's: {first_few(wrong, 3)}"
    return Check(NAME, not wrong, float(len(wrong)), float(mixed_up), detail)


class _Values:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._metadata = unpickle_metadata(folder)
        entries = self._metadata.state_dict_metadata
        self.names = {n for n, one in entries.items() if isinstance(one, BytesStorageMetadata)}

    def _stored(self, name: str) -> StoredValue | None:
        info = (self._metadata.storage_data or {}).get(MetadataIndex(name))
        path = info and self.folder / info.relative_path
        return StoredValue(name, path, info.offset, info.length) if info and path else None

    def digest(self, name: str) -> str:
        """Return the digest of the bytes of an entry; empty if there is none."""
        stored = self._stored(name)
        return stored.digest() if stored else ""

    def load(self, name: str) -> object:
        """Return the plain value of an entry, by torch's own loader; None if there is none."""
        stored = self._stored(name)
        data = b"".join(stored.blocks()) if stored else b""
        return torch.load(io.BytesIO(data), weights_only=True) if data else None
