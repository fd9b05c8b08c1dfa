"""torchtune's importer, `FullModelHFCheckpointer` (release 0.6.1), then `dcp.save`.

    python torchtune_convert.py SRC DST

It loads every file, renames, and re-orders q and k; the names are torchtune's.
"""

import sys
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torchtune.training import FullModelHFCheckpointer


def main(source: Path, target: Path) -> None:
    files = sorted(file.name for file in source.glob("*.safetensors"))
    checkpointer = FullModelHFCheckpointer(
        str(source), files, model_type="LLAMA3", output_dir=str(target)
    )
    dcp.save(checkpointer.load_checkpoint()["model"], checkpoint_id=target)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
