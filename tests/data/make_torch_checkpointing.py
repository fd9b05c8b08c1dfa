"""Makes torch_checkpointing.zip: small folders that torch_checkpointing 0.1.1 itself wrote.

    PYTHONPATH=.:tests:tests/interop python tests/data/make_torch_checkpointing.py

It needs what tests/interop needs. In the archive: ``source``, a Hugging Face folder; ``weights.pt``, the
same weights under the names of titan-0.3 and titan-main; and folders of `KINDS` as store_side.py says.
"""

import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path

import torch
from support import checkpoints
from support.folders import load_dcp, of_main
from titan_env import RELEASES, run_side

from llamaconv import convert_checkpoint, make_plan, open_checkpoint

KINDS = ("one", "one-st", "fsdp", "main-2d-st")
PARAMS = replace(
    checkpoints.GQA, dim=16, n_layers=1, n_heads=6, n_kv_heads=3, ffn_dim=10, vocab_size=18
)


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch) / "home"
        source = checkpoints.write_model(home / "source", PARAMS, shards=1)
        dcp = convert_checkpoint(make_plan(open_checkpoint(source)), Path(scratch) / "dcp").target
        titan = load_dcp(dcp)
        torch.save({"titan-0.3": titan, "titan-main": of_main(titan, PARAMS)}, home / "weights.pt")
        job = {"weights": str(home / "weights.pt"), "home": str(home), "kinds": KINDS}
        run_side(RELEASES[-1].make(), ["store_side.py", "save"], job, Path(scratch) / "job")
        archive = Path(__file__).with_name("torch_checkpointing.zip")
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as made:
            for file in sorted(path for path in home.rglob("*") if path.is_file()):
                # Without the time of day, or each making would be another file.
                entry = zipfile.ZipInfo(str(file.relative_to(home)))
                entry.compress_type = zipfile.ZIP_DEFLATED
                made.writestr(entry, file.read_bytes())


if __name__ == "__main__":
    main()
