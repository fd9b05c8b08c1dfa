"""Makes a folder like that of Llama 3.1 405B: 191 files of headers over bytes that are not there.

python big_folder.py FOLDER
"""

import json
import sys
from pathlib import Path

from llamaconv import keys
from llamaconv.config import to_config
from llamaconv.params import LlamaParams, RopeScaling

PARAMS = LlamaParams(
    dim=16384,
    n_layers=126,
    n_heads=128,
    n_kv_heads=8,
    head_dim=128,
    ffn_dim=53248,
    vocab_size=128256,
    norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
)


def main(folder: Path, n_files: int = 191) -> None:
    shapes = {}
    for role, layer in keys.every(PARAMS):
        shapes[role.in_naming("huggingface", layer) or ""] = role.shape(PARAMS)
    names = sorted(shapes)
    weight_map = {}
    for number in range(n_files):
        file = f"model-{number + 1:05d}-of-{n_files:05d}.safetensors"
        header, end = {}, 0
        for name in names[number::n_files]:
            length = 2
            for n in shapes[name]:
                length *= n
            header[name] = {
                "dtype": "BF16",
                "shape": shapes[name],
                "data_offsets": [end, end + length],
            }
            end += length
            weight_map[name] = file
        text = json.dumps(header).encode()
        with open(folder / file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(to_config(PARAMS, "bfloat16")))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
