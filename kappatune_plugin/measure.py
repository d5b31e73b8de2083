"""Condition numbers of many matrices: several at once, one thread each, behind one bar."""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm

from kappatune_plugin import distributed
from kappatune_plugin.cache import Cache, content_hash
from kappatune_plugin.condition import condition_number
from kappatune_plugin.dealing import cost
from kappatune_plugin.report import UnitReport
from kappatune_plugin.sources import Load, Source
from kappatune_plugin.spectrum import signal_to_noise
from kappatune_plugin.units import WeightUnit

BAR_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]"
# bytes for each value of a matrix: a float64 SVD, the last resort, was seen to take 3.5 copies in float64
MEMORY_A_VALUE = 28


class Bar:
    """Progress over the matrices of a scan, in units of work; `steps` says how many matrices there are.

    With several ranks the first shows one, and takes the others to be as far as itself.
    """

    def __init__(self, units: Sequence[WeightUnit], show: bool) -> None:
        self._steps = len(units)
        self._done: set[str] = set()
        show = show and distributed.rank() == 0
        self._bar = tqdm(total=sum(map(cost, units)), desc="kappa", bar_format=BAR_FORMAT, disable=not show)

    def advance(self, unit: WeightUnit) -> None:
        if unit.name in self._done:
            # again, with a narrower interval
            return
        self._done.add(unit.name)
        done = min(len(self._done) * distributed.world(), self._steps)
        self._bar.set_description_str(f"kappa of {done}/{self._steps} matrices", refresh=False)
        self._bar.update(min(cost(unit) * distributed.world(), self._bar.total - self._bar.n))

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None:
            # what needn't be measured is done too
            self._bar.update(self._bar.total - self._bar.n)
        self._bar.close()


def measure(
    source: Source,
    units: Sequence[WeightUnit],
    rtol: float,
    bar: Bar,
    cache: Cache,
    above: Callable[[WeightUnit], float] = lambda unit: math.inf,
    with_snr: bool = False,
) -> list[UnitReport]:
    """The rows of `units`, in their order, the same on all ranks: each measures those that `source.work` yields there.

    As many matrices at a time as torch has threads, each measured by one thread: that is faster than all threads on
    one matrix, and no number depends on how many threads there are. Only a matrix so large that the memory limit
    of the source leaves threads idle gets several.

    Args:
        cache: rows that it knows are taken from it; it gets the others.
        above: the bound of a unit: once its kappa is certainly above, nothing more is found out. See
            `condition_number`.
        with_snr: also put "snr" into the rows' scores, for which all singular values have to be found.
    """
    rows: dict[str, UnitReport] = {}
    threads, limit = torch.get_num_threads(), source.memory_limit()

    def one(unit: WeightUnit, load: Load) -> UnitReport:
        torch.set_num_threads(max(1, threads // max(1, limit // memory(unit))))
        matrix = load()
        if cache.folder is None:
            return _row(unit, matrix, rtol, above(unit), with_snr)
        content = source.contents[unit.name] = content_hash(matrix)
        row = known(unit)
        if row is None:
            row = _row(unit, matrix, rtol, above(unit), with_snr)
            cache.keep_row(content, row, rtol)
        return row

    def known(unit: WeightUnit) -> UnitReport | None:
        content = source.contents.get(unit.name)
        row = cache.row(content, unit, rtol, above(unit)) if content is not None else None
        return None if row is not None and with_snr and row.status == "ok" and "snr" not in row.scores else row

    def keep(unit: WeightUnit, row: UnitReport) -> None:
        rows[unit.name] = row
        bar.advance(unit)

    unknown = []
    for unit in units:
        row = known(unit)
        if row is None:
            unknown.append(unit)
        else:
            keep(unit, row)
    # ranks may have different caches: the first one's counts
    unknown = distributed.from_first(unknown)
    with _workers(threads) as pool:
        pending: dict[Future, WeightUnit] = {}
        for unit, load in source.work(unknown):
            while pending and memory(unit) + sum(map(memory, pending.values())) > limit:
                _collect(pending, keep)
            pending[pool.submit(one, unit, load)] = unit
            while len(pending) >= threads:
                _collect(pending, keep)
        while pending:
            _collect(pending, keep)
    # the first rank's last, with what it knew from its cache
    for others_rows, others_contents in reversed(distributed.exchange((rows, source.contents))):
        rows.update(others_rows)
        source.contents.update(others_contents)
    return [rows[unit.name] for unit in units]


def _row(unit: WeightUnit, matrix: Tensor, rtol: float, above: float, with_snr: bool) -> UnitReport:
    row = UnitReport.of(unit.name, unit.shape, condition_number(matrix, rtol, above), unit.groups)
    return replace(row, scores={"snr": signal_to_noise(matrix)}) if with_snr and row.status == "ok" else row


def memory(unit: WeightUnit) -> int:
    """Bytes that measuring a unit takes at most."""
    return MEMORY_A_VALUE * unit.shape[0] * unit.shape[1]


def _collect(pending: dict[Future, WeightUnit], keep: Callable[[WeightUnit, UnitReport], None]) -> None:
    """Wait for the first of `pending` that is done, and hand it over."""
    for future in wait(pending, return_when=FIRST_COMPLETED).done:
        keep(pending.pop(future), future.result())


@contextmanager
def _workers(threads: int) -> Iterator[ThreadPoolExecutor]:
    """A pool; a thread's setting of torch's number of threads reaches others through MKL, so it is set back."""
    pool = ThreadPoolExecutor(threads)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
