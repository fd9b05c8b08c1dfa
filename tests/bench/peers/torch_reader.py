"""torch's own way from Hugging Face to a DCP: `HuggingFaceStorageReader`, then `dcp.save`.

    python torch_reader.py SRC DST

Names and the order of q's and k's rows stay as they are, so TorchTitan cannot load the result.
"""

import sys

import torch
import torch.distributed.checkpoint as dcp


def main(source: str, target: str) -> None:
    reader = dcp.HuggingFaceStorageReader(source)
    entries = reader.read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
    }
    dcp.load(state, storage_reader=reader)
    dcp.save(state, checkpoint_id=target)


if __name__ == "__main__":
    main(*sys.argv[1:])
