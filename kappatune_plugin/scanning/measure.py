"""Condition numbers of many matrices: several at a time, one thread each, with a progress bar."""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

from kappatune_plugin.condition.batched import condition_numbers
from kappatune_plugin.condition.kappa import Kappa
from kappatune_plugin.condition.number import condition_number
from kappatune_plugin.condition.signal_to_noise import signal_to_noise
from kappatune_plugin.distributed import ranks
from kappatune_plugin.distributed.work import cost
from kappatune_plugin.scanning.cache import Cache, content_hash
from kappatune_plugin.selection.report import UnitReport
from kappatune_plugin.weights.source import Load, Source
from kappatune_plugin.weights.units import WeightUnit

BAR_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]"
# bytes for each value of a matrix: a float64 SVD, the last resort, was seen to take 3.5 copies in float64
MEMORY_A_VALUE = 28
# bytes of matrices handed to a GPU at a time; `condition_numbers` splits them further
BATCH_BYTES = 1 << 30
Keep = Callable[[WeightUnit, UnitReport], None]


class Bar:
    """Progress bar over the matrices of a scan, weighted by their cost.

    With several ranks only the first shows one, and assumes that the others are as far as itself.
    """

    def __init__(self, units: Sequence[WeightUnit], show: bool) -> None:
        self._steps = len(units)
        self._done: set[str] = set()
        show = show and ranks.rank() == 0
        self._bar = tqdm(total=sum(map(cost, units)), desc="kappa", bar_format=BAR_FORMAT, disable=not show)

    def advance(self, unit: WeightUnit) -> None:
        if unit.name in self._done:
            # measured again, for a narrower interval
            return
        self._done.add(unit.name)
        done = min(len(self._done) * ranks.world(), self._steps)
        self._bar.set_description_str(f"kappa of {done}/{self._steps} matrices", refresh=False)
        self._bar.update(min(cost(unit) * ranks.world(), self._bar.total - self._bar.n))

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None:
            # matrices that needn't be measured count as done
            self._bar.update(self._bar.total - self._bar.n)
        self._bar.close()


def measure(
    source: Source,
    units: Sequence[WeightUnit],
    rtol: float,
    above: Callable[[WeightUnit], float] = lambda unit: math.inf,
    *,
    bar: Bar,
    cache: Cache,
    with_snr: bool = False,
) -> list[UnitReport]:
    """The rows of `units`, in their order, the same on all ranks: each measures those that `source.work` yields there.

    On a GPU, in batches of equal shapes. On the CPU, as many matrices at a time as torch has threads, each measured by
    one thread, and as the source's memory limit allows: that is faster than all threads on one matrix, and the digits
    don't depend on how many there are.

    Args:
        above: a unit's bound: measuring it stops once its kappa is certainly above. See `condition_number`.
        cache: rows it has are taken from it; new ones are added.
        with_snr: also put "snr" into the rows' scores, which takes all singular values.
    """
    rows: dict[str, UnitReport] = {}

    def keep(unit: WeightUnit, row: UnitReport) -> None:
        rows[unit.name] = row
        bar.advance(unit)

    measurer = _Measurer(source.contents, rtol, cache, above, with_snr)
    unknown = []
    for unit in units:
        row = measurer.known(unit)
        if row is None:
            unknown.append(unit)
        else:
            keep(unit, row)
    # ranks may have different caches: the first rank's counts
    work = source.work(ranks.from_first(unknown))
    if torch.cuda.is_available():
        _in_batches(measurer, work, torch.device("cuda", torch.cuda.current_device()), keep)
    else:
        _in_threads(measurer, work, source.memory_limit(), keep)
    # reversed, so that the first rank's rows, with those from its cache, win
    for others_rows, others_contents in reversed(ranks.exchange((rows, source.contents))):
        rows.update(others_rows)
        source.contents.update(others_contents)
    return [rows[unit.name] for unit in units]


@dataclass(frozen=True)
class _Measurer:
    """Measures matrices through the cache. New hashes go into `contents`; other fields as in `measure`."""

    contents: dict[str, str]
    rtol: float
    cache: Cache
    above: Callable[[WeightUnit], float]
    with_snr: bool

    def known(self, unit: WeightUnit) -> UnitReport | None:
        """The unit's row from the cache, if its hash is in `contents`; else None."""
        content = self.contents.get(unit.name)
        row = self.cache.row(content, unit, self.rtol, self.above(unit)) if content is not None else None
        lacks_snr = row is not None and self.with_snr and row.status == "ok" and "snr" not in row.scores
        return None if lacks_snr else row

    def known_by_content(self, unit: WeightUnit, matrix: Tensor) -> UnitReport | None:
        if self.cache.folder is None:
            return None
        self.contents[unit.name] = content_hash(matrix)
        return self.known(unit)

    def row(self, unit: WeightUnit, matrix: Tensor) -> UnitReport:
        row = self.known_by_content(unit, matrix)
        if row is None:
            kappa = condition_number(matrix, self.rtol, self.above(unit))
            row = self.keep(unit, _row(unit, matrix, kappa, self.with_snr))
        return row

    def keep(self, unit: WeightUnit, row: UnitReport) -> UnitReport:
        if self.cache.folder is not None:
            self.cache.keep_row(self.contents[unit.name], row, self.rtol)
        return row


def _row(unit: WeightUnit, matrix: Tensor, kappa: Kappa, with_snr: bool) -> UnitReport:
    row = UnitReport.of(unit.name, unit.shape, kappa, unit.groups)
    return replace(row, scores={"snr": signal_to_noise(matrix)}) if with_snr and row.status == "ok" else row


def _in_threads(measurer: _Measurer, work: Iterator[tuple[WeightUnit, Load]], limit: int, keep: Keep) -> None:
    threads = torch.get_num_threads()

    def one(unit: WeightUnit, load: Load) -> UnitReport:
        torch.set_num_threads(1)
        return measurer.row(unit, load())

    with _workers(threads) as pool:
        pending: dict[Future, WeightUnit] = {}
        for unit, load in work:
            while pending and memory(unit) + sum(map(memory, pending.values())) > limit:
                _collect(pending, keep)
            pending[pool.submit(one, unit, load)] = unit
            # it may hold the matrix, which would stay in memory while the next one is gathered
            del load
            while len(pending) >= threads:
                _collect(pending, keep)
        while pending:
            _collect(pending, keep)


def _in_batches(measurer: _Measurer, work: Iterator[tuple[WeightUnit, Load]], device: torch.device, keep: Keep) -> None:
    """Measure in batches; work comes most expensive first, so equal shapes follow each other."""
    batch: list[tuple[WeightUnit, Tensor]] = []

    def measure_batch() -> None:
        if batch:
            stack, bound = torch.stack([matrix for _, matrix in batch]), measurer.above(batch[0][0])
            for (unit, matrix), kappa in zip(batch, condition_numbers(stack, measurer.rtol, bound), strict=True):
                keep(unit, measurer.keep(unit, _row(unit, matrix, kappa, measurer.with_snr)))
            batch.clear()

    for unit, load in work:
        matrix = load()
        row = measurer.known_by_content(unit, matrix)
        if row is not None:
            keep(unit, row)
            continue
        matrix = matrix if matrix.device.type == device.type else matrix.to(device)
        if batch and (_form(matrix) != _form(batch[0][1]) or len(batch) * matrix.nbytes >= BATCH_BYTES):
            measure_batch()
        batch.append((unit, matrix))
    measure_batch()


def _form(matrix: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return matrix.shape, matrix.dtype, matrix.device


def memory(unit: WeightUnit) -> int:
    """Upper bound on the bytes that measuring a unit takes."""
    return MEMORY_A_VALUE * unit.shape[0] * unit.shape[1]


def _collect(pending: dict[Future, WeightUnit], keep: Keep) -> None:
    """Wait until some of `pending` are done, and keep their rows."""
    for future in wait(pending, return_when=FIRST_COMPLETED).done:
        keep(pending.pop(future), future.result())


@contextmanager
def _workers(threads: int) -> Iterator[ThreadPoolExecutor]:
    """A thread pool. Setting torch's number of threads in one reaches others through MKL, so it is reset at the end."""
    pool = ThreadPoolExecutor(threads)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
