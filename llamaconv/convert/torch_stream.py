"""A stream for ``torch.save`` that inserts the bytes of tensors as they are produced.

Under ``torch.serialization.skip_data`` torch writes the envelope around tensors without data, and
seeks past the bytes of each. Here every such seek writes the next payload. So torch decides about
its format, and no tensor is ever whole in memory.

The concession: the checksums inside are those of entries without data. ``torch.load`` does not
check them (and with ``torch.serialization.set_crc32_options(False)`` torch does not write real ones
either), but other tools may complain. The receipt has a digest of every piece instead.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from typing import IO, Any, cast

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from llamaconv.checkpoint.buffers import scratch
from llamaconv.convert.output import Output, Payload
from llamaconv.report.errors import FailedError


def save_streamed(value: Any, output: Output, payloads: Iterable[Payload]) -> list[str]:
    """Call ``torch.save(value, output)`` with each tensor's bytes from ``payloads``.

    Args:
        value: Contains tensors that give shape and dtype only.
        output: The file.
        payloads: The bytes of the tensors, in their order.

    Returns:
        The xxh3-128 digest of each payload.

    Raises:
        FailedError: This torch writes tensors in an unknown way; and what `Output` or a payload
            raises.
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
                raise FailedError(
                    f"internal error: {n_bytes} bytes written, expected {offset}; please report this"
                )
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
    """While entered, new tensors have a shape and a dtype but no data, in any thread.

    Without `avoid_device_init` torch would prepare for tensors of a GPU. In a build with CUDA, that
    leaves a pointer to memory of the thread, and once the thread has ended, the next one crashes
    (until https://github.com/pytorch/pytorch/pull/178950, which 2.10 lacks and 2.13 has).
    """

    @property
    def avoid_device_init(self) -> bool:
        return False


def without_data(
    wanted: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
) -> dict[str, torch.Tensor]:
    """Return tensors of these shapes and dtypes, never written to: they cost only address space."""
    try:
        return {name: _untouched(shape, dtype) for name, (shape, dtype) in wanted.items()}
    except OSError:
        # Address space may be limited too (ulimit -v, or a system that does not overcommit). These
        # tensors need none, but the first of them imports a compiler: a second, and 100 MB.
        with _WithoutData():
            return {
                name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in wanted.items()
            }


def _untouched(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    n_bytes = prod(shape) * dtype.itemsize
    if not n_bytes:
        return torch.empty(shape, dtype=dtype)  # frombuffer takes no empty one
    return torch.frombuffer(scratch(n_bytes), dtype=dtype).view(shape)
