"""Look at the values of weights: statistics, NaN and infinities, zeros, copies, a histogram.

Limit: whether values are good ones is not seen; only what no working model has.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from llamaconv.checkpoint.address import local
from llamaconv.checkpoint.checkpoint import Checkpoint
from llamaconv.checkpoint.model_order import in_order
from llamaconv.checkpoint.reader import PieceReader, same_bytes
from llamaconv.checkpoint.tensors import TensorInfo
from llamaconv.checkpoint.torch_rows import TensorBuffer, read_rows
from llamaconv.checkpoint.value_statistics import FAR, Histogram, Statistics
from llamaconv.model.names import identify
from llamaconv.report.errors import Problem, first_few, warning
from llamaconv.report.progress import Progress, no_progress

_BLOCK_BYTES = 4 << 20
# Of the published Llamas no weight is above some hundreds.
_MOST_PLAUSIBLE = 1e4


@dataclass(frozen=True)
class OddValues:
    """What is odd about the values of one tensor.

    Attributes:
        name: The tensor.
        n_nan: Number of elements that are NaN.
        n_infinite: Number of elements that are infinite.
        is_zero: Whether every element is zero.
    """

    name: str
    n_nan: int = 0
    n_infinite: int = 0
    is_zero: bool = False

    def __str__(self) -> str:
        counts = (f"{self.n_nan:,} NaN", self.n_nan), (f"{self.n_infinite:,} inf", self.n_infinite)
        return f"{self.name} ({', '.join(text for text, count in counts if count)})"

    def to_json(self) -> dict[str, Any]:
        """Return ``name``, ``nan`` and ``inf`` (counts), ``zero`` (whether all elements are)."""
        zero = self.is_zero
        return {"name": self.name, "nan": self.n_nan, "inf": self.n_infinite, "zero": zero}


def count_not_finite(values: Tensor) -> tuple[int, int]:
    """Return how many elements are NaN, and how many are infinite."""
    if not values.numel() or not values.is_floating_point():
        return 0, 0
    if values.dtype.itemsize == 1:
        values = values.float()
    # Nearly always all are finite. aminmax passes a NaN on, and needs no copy of the values.
    if all(map(torch.isfinite, torch.aminmax(values))):
        return 0, 0
    return int(values.isnan().sum()), int(values.isinf().sum())


def scan_statistics(found: Checkpoint, progress: Progress = no_progress) -> list[Statistics]:
    """Read every tensor in windows of bounded memory.

    Args:
        found: A local checkpoint.
        progress: Called with "read", the bytes read so far, and all bytes.

    Returns:
        The statistics of each tensor, in the order of a forward pass.

    Raises:
        RefusedError: The checkpoint is on the Hub.
        FailedError: A file cannot be read.
    """
    local(found.path)
    statistics, done = [], 0
    for tensor in in_order(found.tensors.values(), found.naming):
        one = Statistics(tensor.name)
        for values in _windows(tensor):
            one += _statistics(tensor.name, values)
            done += values.nbytes
            progress("read", done, found.total_bytes)
        statistics.append(one)
    return statistics


def scan_values(found: Checkpoint, progress: Progress = no_progress) -> list[OddValues]:
    """Return the tensors whose values are odd; arguments and errors as of `scan_statistics`."""
    return odd_values(scan_statistics(found, progress))


def odd_values(statistics: Iterable[Statistics]) -> list[OddValues]:
    """Return which tensors have NaN or infinities, or are all zero."""
    odd = (OddValues(one.name, one.n_nan, one.n_infinite, one.is_zero) for one in statistics)
    return [one for one in odd if one.n_nan or one.n_infinite or one.is_zero]


def histogram(tensor: TensorInfo, n_bars: int = 24) -> Histogram:
    """Read one tensor twice: once for its range, once to count.

    Raises:
        RefusedError: It is on the Hub.
        FailedError: A file cannot be read.
    """
    for piece in tensor.pieces:
        local(piece.file)
    of = Statistics(tensor.name)
    for values in _windows(tensor):
        of += _statistics(tensor.name, values)
    reach = FAR * of.deviation
    lowest, highest = max(of.minimum, of.mean - reach), min(of.maximum, of.mean + reach)
    if not of.n_finite or not of.deviation or lowest >= highest:
        # All values are one value, or there is none.
        at = of.mean
        return Histogram(of, at - 0.5, at + 0.5, (of.n_finite,))
    counts = torch.zeros(n_bars, dtype=torch.int64)
    n_below = n_above = 0
    for values in _windows(tensor):
        wide = _wide(values).float()
        wide = wide[wide.isfinite()] if of.n_finite < of.n_elements else wide
        counts += torch.histc(wide, n_bars, lowest, highest).long()
        n_below += int((wide < lowest).sum())
        n_above += int((wide > highest).sum())
    return Histogram(of, lowest, highest, tuple(counts.tolist()), n_below, n_above)


def copies(found: Checkpoint, statistics: Sequence[Statistics]) -> list[tuple[str, ...]]:
    """Return groups of tensors that hold the same bits, such as a tied head that is also stored.

    Only tensors whose statistics are equal are read again. Constant ones are no copies.

    Raises:
        FailedError: A file cannot be read.
    """
    alike: dict[object, list[str]] = {}
    for one in statistics:
        if one.minimum < one.maximum:
            tensor = found.tensors[one.name]
            key = (tensor.shape, tensor.dtype, replace(one, name=""))
            alike.setdefault(key, []).append(one.name)
    groups = []
    for first, *rest in (names for names in alike.values() if len(names) > 1):
        same = [n for n in rest if same_bytes(found.tensors[first], found.tensors[n])]
        groups += [(first, *same)] if same else []
    return groups


def _windows(tensor: TensorInfo) -> Iterator[Tensor]:
    """Yield the tensor's rows, some at a time; each is valid until the next."""
    window = TensorBuffer()
    with PieceReader() as reader:
        for first, last in tensor.windows(_BLOCK_BYTES):
            yield read_rows(reader, tensor, first, last, window)


def _wide(values: Tensor) -> Tensor:
    """Return ``values`` as float32, or as float64 if float32 cannot hold them."""
    if values.is_complex():
        values = torch.view_as_real(values)
    is_narrow = values.is_floating_point() and values.dtype.itemsize <= 4
    return values.to(torch.float32 if is_narrow or values.dtype.itemsize == 1 else torch.float64)


def _range(values: Tensor) -> tuple[float, float]:
    """Return the smallest and the largest element; NaN if one is NaN."""
    if not values.numel():
        return 0.0, 0.0
    least, most = torch.aminmax(values)
    return float(least), float(most)


def _statistics(name: str, values: Tensor) -> Statistics:
    """Return the statistics of some rows."""
    wide = _wide(values)
    least, most = _range(wide)
    is_finite = isfinite(least) and isfinite(most)
    finite = wide if is_finite else wide[wide.isfinite()]
    if not is_finite:
        least, most = _range(finite)
    n_infinite = int(wide.isinf().sum()) if finite.numel() < wide.numel() else 0
    n_zero = wide.numel() - int(torch.count_nonzero(wide))
    rows = 0
    if values.ndim > 1 and n_zero >= wide[0].numel():
        rows = int((~wide.flatten(1).any(1)).sum())
    one = Statistics(
        name,
        wide.numel(),
        finite.numel(),
        n_nan=wide.numel() - finite.numel() - n_infinite,
        n_infinite=n_infinite,
        n_zero=n_zero,
        n_zero_rows=rows,
    )
    if not finite.numel():
        return one
    # Squares of the largest numbers of float32 overflow in it.
    finite = finite.double() if max(-least, most) > 1e15 else finite
    mean = float(finite.mean(dtype=torch.float64))
    squares = float(torch.linalg.vector_norm(finite - mean)) ** 2
    return replace(one, minimum=least, maximum=most, mean=mean, squares=squares)


def suspicious_values(found: Checkpoint, statistics: Sequence[Statistics]) -> list[Problem]:
    """Return warnings for values that training does not produce, but damaged files have."""
    return [*_zero_rows(found, statistics), *_huge(found, statistics)]


def _zero_rows(found: Checkpoint, statistics: Iterable[Statistics]) -> list[Problem]:
    """Return a warning for rows of zeros in layers, as files with holes have."""
    holes = [
        one
        for one in statistics
        # A token that is never used may have a row of zeros.
        if one.n_zero_rows
        and not one.is_zero
        and (known := identify(one.name, found.naming))
        and known[1] is not None
    ]
    if not holes:
        return []
    rows = (f"{one.name} ({one.n_zero_rows:,} rows)" for one in holes)
    return [
        warning(
            f"{found.path}: {len(holes)} tensors of layers have rows that are all zero: "
            f"{first_few(rows)}. The model was pruned, or a download left holes in a file: "
            "compare the folder with its repository (--against)",
            [one.name for one in holes],
        )
    ]


def _huge(found: Checkpoint, statistics: Iterable[Statistics]) -> list[Problem]:
    """Return a warning for weights that are larger than any trained ones, as random bits are."""
    huge = [one for one in statistics if max(-one.minimum, one.maximum) > _MOST_PLAUSIBLE]
    if not huge:
        return []
    largest = max(max(-one.minimum, one.maximum) for one in huge)
    names = [one.name for one in huge]
    return [
        warning(
            f"{found.path}: {len(huge)} tensors hold values up to {largest:.2g}: "
            f"{first_few(names)}. Trained weights are smaller, and random bits look like this: "
            "compare the folder with its repository (--against), or download it again",
            names,
        )
    ]


def value_problems(where: object, odd: Sequence[OddValues]) -> list[Problem]:
    """Return an error for values that are not finite, and a warning for weights that are zero."""
    problems = []
    if broken := [one for one in odd if one.n_nan or one.n_infinite]:
        n_nan, n_infinite = sum(one.n_nan for one in broken), sum(one.n_infinite for one in broken)
        problems.append(
            Problem(
                f"{where}: {len(broken)} tensors hold values that are not finite, {n_nan:,} NaN "
                f"and {n_infinite:,} infinite: {first_few(map(str, broken))}. The training "
                "diverged, or the file is damaged: use an earlier checkpoint, or download it again",
                tuple(one.name for one in broken),
            )
        )
    # Biases start as zeros.
    if zero := [one.name for one in odd if one.is_zero and not one.name.endswith(".bias")]:
        problems.append(
            warning(
                f"{where}: {len(zero)} tensors are all zero: {first_few(zero)}. Check that they "
                "were saved",
                zero,
            )
        )
    return problems
