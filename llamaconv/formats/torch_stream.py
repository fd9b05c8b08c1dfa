"""The stream that ``torch.save`` writes to, which lets tensors' bytes through as they come.

Under ``torch.serialization.skip_data`` torch writes the envelope around tensors that have no
data and seeks past each place where bytes belong; here every such seek is answered by writing
the next payload. So torch keeps ownership of its format, and no tensor is ever whole in memory.

The concession: the checksums inside are those of entries without data. ``torch.load`` does not
check them (nor does it write real ones with ``torch.serialization.set_crc32_options(False)``);
tools other than torch may complain. The receipt carries a digest of every piece instead.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from typing import IO, Any, cast

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from llamaconv.formats.output import Output, Payload
from llamaconv.problems import FailedError
from llamaconv.scratch import scratch


def save_streamed(value: Any, output: Output, payloads: Iterable[Payload]) -> list[str]:
    """``torch.save(value, output)`` with each tensor's bytes from ``payloads``, in order.

    The tensors in ``value`` give shape and dtype only. Returns the xxh3-128 digest of each
    payload. Raises what a payload raises, and what `Output` does.
    """
    stream = _Stream(output, payloads)
    try:
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(value, cast(IO[bytes], stream))
    except Exception as error:
        # torch.save ends its file even then, and that error would hide the cause.
        raise stream.failure or error from None
    if next(stream.payloads, None) is not None:
        raise FailedError("this torch writes tensors in a way llamaconv does not know")
    return stream.digests


class _Stream(io.RawIOBase):
    def __init__(self, output: Output, payloads: Iterable[Payload]) -> None:
        self.output = output
        self.payloads = iter(payloads)
        self.digests: list[str] = []
        self.failure: BaseException | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        with self._remembering():
            return self.output.write(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with self._remembering():
            payload = next(self.payloads, None)
            if whence != io.SEEK_CUR or payload is None:
                raise FailedError("this torch writes tensors in a way llamaconv does not know")
            n_bytes, digest = self.output.stream(payload)
            if n_bytes != offset:
                raise FailedError(f"{offset} bytes were to be written, {n_bytes} were")
            self.digests.append(digest)
        return self.output.tell()

    @contextmanager
    def _remembering(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self.failure = self.failure or error
            raise


class _WithoutData(FakeTensorMode):
    """While entered, tensors of the processor have shape and dtype and no data, in any thread.

    torch would prepare for tensors of a GPU that is not there. In a build with CUDA that leaves a
    pointer to the memory of the thread, and once that has ended the next one crashes (until
    https://github.com/pytorch/pytorch/pull/178950, which 2.10 lacks and 2.13 has).
    """

    @property
    def avoid_device_init(self) -> bool:
        return False


def without_data(
    wanted: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
) -> dict[str, torch.Tensor]:
    """Tensors of these shapes and dtypes to save: nobody writes to them, so they cost address space only."""
    try:
        return {name: _untouched(shape, dtype) for name, (shape, dtype) in wanted.items()}
    except OSError:
        # There is a limit even to that (ulimit -v, or a system that promises no more than it has).
        # These cost nothing, but the first of them imports a compiler: a second, and 100 MB.
        with _WithoutData():
            return {
                name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in wanted.items()
            }


def _untouched(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    n_bytes = prod(shape) * dtype.itemsize
    if not n_bytes:
        return torch.empty(shape, dtype=dtype)  # frombuffer takes no empty one
    return torch.frombuffer(scratch(n_bytes), dtype=dtype).view(shape)
