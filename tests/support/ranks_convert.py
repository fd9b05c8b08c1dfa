"""Run by torchrun: one source converted to several targets, by ranks that meet once.

    torchrun --standalone --nproc-per-node 3 ranks_convert.py SRC HOME JSON

JSON maps a folder's name in HOME to the target options. Every rank writes its receipt there, and
rank 0 what progress it was told.
"""

import json
import sys
from pathlib import Path

from llamaconv import Target, convert_checkpoint, make_plan, open_checkpoint
from llamaconv.ranks import from_environment

source, home, wanted = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
with from_environment() as ranks:
    for name, options in wanted.items():
        plan = make_plan(open_checkpoint(source), Target(**options))
        said = []
        done = convert_checkpoint(
            plan,
            home / name,
            ranks=ranks,
            progress=lambda *what: said.append(what),  # noqa: B023
        )
        result = done.to_json() | {"receipt": done.receipt.to_json(), "said": said}
        result["layers"] = done.verification.layers
        result["tensors"] = [vars(one) for one in done.verification.tensors]
        (home / f"{name}-{ranks.rank}.json").write_text(json.dumps(result))
