"""torch's own way between a DCP and one ``torch.save`` file (torch.distributed.checkpoint.format_utils).

    python torch_formats.py SRC DST

From a DCP it writes DST/model.pt, from ``consolidated.00.pth`` a DCP. Names and rows stay as they are.
"""

import sys
from pathlib import Path

from torch.distributed.checkpoint.format_utils import dcp_to_torch_save, torch_save_to_dcp


def main(source: Path, target: Path) -> None:
    if (source / ".metadata").exists():
        target.mkdir()
        dcp_to_torch_save(source, target / "model.pt")
    else:
        torch_save_to_dcp(source / "consolidated.00.pth", target)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
