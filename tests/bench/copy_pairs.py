"""How fast and how small: conversions in pairs with a plain copy of the same files.

    python tests/bench/copy_pairs.py [--gigabytes 3] [--pairs 5] [--folder DIR]

Each pair copies the checkpoint with ``cp`` and an fsync a file, then converts it, neither
output on the disk before (pages touched for the first time otherwise decide on a virtual
machine). Prints the median ratio of the engine's own time (imports apart) and of the whole
command to the copy, with their spread, and the peak memory of the whole process: resident,
and the part of it that is anonymous.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

# A Llama of 3.0 GB in bf16; other sizes take more or fewer layers.
SHAPE = {"hidden_size": 2048, "intermediate_size": 8192, "vocab_size": 128256, "head_dim": 64}
HEADS, KV_HEADS = 32, 8


def generate(folder: Path, n_bytes: float) -> None:
    """A Hugging Face folder of about that many bytes, random bits in plausible bf16 ranges."""
    import torch
    from safetensors.torch import save_file

    dim, ffn, vocabulary = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["vocab_size"]
    kv = KV_HEADS * SHAPE["head_dim"]
    layer = 2 * (2 * dim * dim + 2 * kv * dim + 3 * ffn * dim)
    n_layers = max(1, round((n_bytes - 4 * vocabulary * dim) / layer))
    folder.mkdir(parents=True)
    weight_map = {}

    def shard(number: int, shapes: dict[str, tuple[int, ...]]) -> None:
        generator = torch.Generator().manual_seed(number)
        tensors = {
            name: torch.randint(15000, 16000, shape, dtype=torch.int16, generator=generator).view(
                torch.bfloat16
            )
            for name, shape in shapes.items()
        }
        file = f"model-{number:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shapes, file))

    ends = {"model.embed_tokens.weight": (vocabulary, dim), "model.norm.weight": (dim,)}
    shard(0, ends)
    shard(1, {"lm_head.weight": (vocabulary, dim)})
    for start in range(0, n_layers, 8):
        shapes: dict[str, tuple[int, ...]] = {}
        for number in range(start, min(start + 8, n_layers)):
            at = f"model.layers.{number}."
            shapes |= {
                f"{at}input_layernorm.weight": (dim,),
                f"{at}post_attention_layernorm.weight": (dim,),
                f"{at}self_attn.q_proj.weight": (dim, dim),
                f"{at}self_attn.k_proj.weight": (kv, dim),
                f"{at}self_attn.v_proj.weight": (kv, dim),
                f"{at}self_attn.o_proj.weight": (dim, dim),
                f"{at}mlp.gate_proj.weight": (ffn, dim),
                f"{at}mlp.up_proj.weight": (ffn, dim),
                f"{at}mlp.down_proj.weight": (dim, ffn),
            }
        shard(2 + start // 8, shapes)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {
        **SHAPE,
        "model_type": "llama",
        "num_hidden_layers": n_layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
    }
    (folder / "config.json").write_text(json.dumps(config))


def copy(source: Path, target: Path) -> float:
    began = time.perf_counter()
    target.mkdir()
    for file in sorted(source.iterdir()):
        subprocess.run(["cp", file, target / file.name], check=True)
        descriptor = os.open(target / file.name, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return time.perf_counter() - began


def convert(source: Path, target: Path, options: list[str]) -> tuple[float, float, int, int]:
    """Whole seconds, the engine's seconds, peak resident bytes, peak anonymous bytes."""
    command = [sys.executable, "-m", "llamaconv", "convert", str(source), str(target), "--json"]
    began = time.perf_counter()
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True)
    peaks = {"VmHWM": 0, "RssAnon": 0}
    watcher = threading.Thread(target=watch, args=(process, peaks))
    watcher.start()
    output, _ = process.communicate()
    whole = time.perf_counter() - began
    watcher.join()
    if process.returncode:
        raise SystemExit(f"conversion failed: {output}")
    return whole, json.loads(output)["seconds"], peaks["VmHWM"], peaks["RssAnon"]


def watch(process: subprocess.Popen[str], peaks: dict[str, int]) -> None:
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            return
        for line in status.splitlines():
            name, _, value = line.partition(":")
            if name in peaks:
                peaks[name] = max(peaks[name], int(value.split()[0]) * 1024)
        time.sleep(0.005)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument(
        "--folder", type=Path, default=None, help="where to write (default: a temporary folder)"
    )
    parser.add_argument(
        "--verify", action="store_true", help="with the checks, in the whole command's time"
    )
    parser.add_argument("options", nargs="*", help="options of convert, after --")
    options = parser.parse_args()
    extra = [*options.options, *([] if options.verify else ["--no-verify"])]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source, target = Path(folder) / "source", Path(folder) / "target"
        generate(source, options.gigabytes * 1e9)
        n_bytes = sum(file.stat().st_size for file in source.iterdir())
        engine, whole, copies, resident, anonymous = [], [], [], 0, 0
        for _ in range(options.pairs):
            copies.append(copy(source, target))
            shutil.rmtree(target)
            os.sync()
            seconds, inner, peak, peak_anonymous = convert(source, target, extra)
            shutil.rmtree(target)
            os.sync()
            engine.append(inner / copies[-1])
            whole.append(seconds / copies[-1])
            resident, anonymous = max(resident, peak), max(anonymous, peak_anonymous)
    print(f"{n_bytes / 1e9:.2f} GB, {options.pairs} pairs, options: {' '.join(extra)}")
    print(f"copy and fsync: {min(copies):.1f} to {max(copies):.1f} s")
    for name, ratios in (("engine / copy", engine), ("whole command / copy", whole)):
        print(
            f"{name}: median {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}"
        )
    print(
        f"peak memory: {resident / 1e6:.0f} MB resident, {anonymous / 1e6:.0f} MB of it anonymous"
    )


if __name__ == "__main__":
    main()
