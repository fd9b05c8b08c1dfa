"""Converting from the Hub, against fetching the same bytes to nowhere: is it slower than the download?

    python tests/bench/hub.py [--gigabytes 3] [--pairs 3] [--rate 200] [--delay 50] [--folder DIR]

A process of its own serves a repository on the loopback, with at most ``--rate`` MB/s over all
connections and ``--delay`` ms added to each request. In each pair, a program without anything of
llamaconv fetches all weights by ranges, 16 at a time, and drops them; then the command line converts
the repository to a DCP, without and with the checks. Prints seconds, their ratios (the median of all
pairs; imports included, and the engine's own seconds), the bytes that were served, and the memory.

The limit: server and clients share one machine's processors.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import inputs
import measure

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import hub_server

_AT_ONCE, _RANGE_BYTES, _SENT_BYTES = 16, 8 << 20, 256 << 10


class Limit:
    """Lets so many bytes a second pass, over all threads."""

    def __init__(self, rate: float) -> None:
        self._rate, self._free = rate, 0.0
        self._lock = threading.Lock()

    def wait(self, n_bytes: int) -> None:
        with self._lock:
            self._free = max(self._free, time.monotonic()) + n_bytes / self._rate
            until = self._free
        time.sleep(max(0.0, until - time.monotonic()))


def serve(folder: Path, rate: float, delay: float, addresses: Any, counts: Any) -> None:
    """Serves until the process is ended; every line from ``counts`` asks for the bytes so far."""
    limit, digests = Limit(rate), {}

    def listed(file: Path) -> dict[str, object]:
        if file.name not in digests:
            with file.open("rb") as content:
                digests[file.name] = hashlib.file_digest(content, "sha256").hexdigest()
        size = file.stat().st_size
        lfs = {"sha256": digests[file.name], "size": size, "pointerSize": 134}
        return {"size": size, "lfs": lfs, "blobId": "0" * 40}

    for file in folder.iterdir():
        listed(file)
    hub_server.listed = listed

    class Slow(hub_server.Handler):
        def do_GET(self) -> None:  # noqa: N802
            time.sleep(delay)
            super().do_GET()

        do_HEAD = do_GET  # noqa: N815

        def send_bytes(self, block: bytes) -> int:
            limit.wait(len(block))
            return super().send_bytes(block)

        def send_range(self, content: Any, first: int, last: int) -> None:
            self.wfile.flush()
            while first < last:
                limit.wait(n_bytes := min(_SENT_BYTES, last - first))
                for sent in _sent(self.connection.fileno(), content.fileno(), first, n_bytes):
                    first += sent
                    with self.hub.lock:
                        self.hub.bytes_sent += sent

    hub_server.Handler = Slow  # type: ignore[misc]
    with hub_server.serve(model=folder) as hub:
        addresses.put(hub.endpoint)
        while counts[0].get():
            counts[1].put(hub.bytes_sent)


def _sent(connection: int, file: int, first: int, n_bytes: int) -> Iterator[int]:
    while n_bytes:
        sent = os.sendfile(connection, file, first, n_bytes)
        yield sent
        first, n_bytes = first + sent, n_bytes - sent


@contextmanager
def served(folder: Path, rate: float, delay: float) -> Iterator[tuple[str, Any]]:
    """The endpoint, and a function that returns the bytes sent so far."""
    spawn = multiprocessing.get_context("spawn")
    addresses, counts = spawn.Queue(), (spawn.Queue(), spawn.Queue())
    process = spawn.Process(target=serve, args=(folder, rate, delay, addresses, counts))
    process.start()

    def n_bytes() -> int:
        counts[0].put(1)
        return int(counts[1].get())

    try:
        yield addresses.get(), n_bytes
    finally:
        counts[0].put(0)
        process.join()


def fetch(endpoint: str, folder: Path) -> None:
    """Fetches all weights to nowhere."""
    host = endpoint.removeprefix("http://")
    ranges = [
        (file.name, first, min(first + _RANGE_BYTES, file.stat().st_size))
        for file in sorted(folder.glob("*.safetensors"))
        for first in range(0, file.stat().st_size, _RANGE_BYTES)
    ]
    mine = threading.local()

    def one(name: str, first: int, last: int) -> None:
        if not hasattr(mine, "connection"):
            mine.connection = http.client.HTTPConnection(host)
            mine.memory = memoryview(bytearray(1 << 20))
        asked = {"range": f"bytes={first}-{last - 1}"}
        mine.connection.request("GET", f"/cdn/org/model/{name}", headers=asked)
        answer, left = mine.connection.getresponse(), last - first
        assert answer.status == 206
        while left:
            left -= answer.readinto(mine.memory[:left])
        answer.read()

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(one, *zip(*ranges, strict=True)))


def main() -> None:
    options = _options()
    if options.fetch:
        fetch(*options.fetch[:1], Path(options.fetch[1]))
        return
    rows: dict[str, list[Any]] = {"fetch": [], "no checks": [], "engine": [], "checks": []}
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder, target = Path(temporary) / "hf", Path(temporary) / "target"
        inputs.write(folder, params := inputs.of_size(options.gigabytes * 1e9))
        total = sum(file.stat().st_size for file in folder.iterdir())
        with served(folder, options.rate * 1e6, options.delay / 1e3) as (endpoint, n_bytes):
            home = {
                "HF_ENDPOINT": endpoint,
                "HF_HOME": temporary,
                "NO_PROXY": "127.0.0.1,localhost",
            }
            environment = {**os.environ, **home}
            convert = [sys.executable, "-m", "llamaconv", "convert", "hf://org/model", str(target)]
            commands = {
                "fetch": [sys.executable, __file__, "--fetch", endpoint, str(folder)],
                "no checks": [*convert, "--json", "--no-verify"],
                "checks": [*convert, "--json"],
            }
            for number in range(options.pairs):
                for name, command in commands.items():
                    measure.cache(folder, warm=True)
                    before = n_bytes()
                    done = measure.run(command, environment=environment)
                    if done.failure:
                        raise SystemExit(f"{name}: {done.failure}")
                    rows[name].append(done.seconds)
                    engine = json.loads(done.output)["seconds"] if name != "fetch" else 0.0
                    if name == "no checks":
                        rows["engine"].append(engine)
                    print(
                        f"{number + 1}: {name}: {done.seconds:.2f} s, engine {engine:.2f} s, "
                        f"{n_bytes() - before:,} bytes served of {total:,}, "
                        f"anonymous {done.anonymous / 1e6:.0f} MB",
                        flush=True,
                    )
                    for left in Path(temporary).glob("target*"):
                        shutil.rmtree(left)
    print(f"{inputs.size(params) / 1e9:.2f} GB, {options.rate} MB/s, {options.delay} ms a request")
    for name, seconds in rows.items():
        ratios = [one / base for one, base in zip(seconds, rows["fetch"], strict=True)]
        middle, ratio = statistics.median(seconds), statistics.median(ratios)
        print(
            f"{name}: {middle:.2f} s, {ratio:.3f} of the fetch ({min(ratios):.3f} to {max(ratios):.3f})"
        )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gigabytes", type=float, default=3.0, help="bytes of weights in bf16")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--rate", type=float, default=200.0, help="MB/s over all connections")
    parser.add_argument("--delay", type=float, default=50.0, help="ms added to each request")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--fetch", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
