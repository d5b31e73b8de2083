"""A model in, the condition number of each of its weight matrices out."""

import os
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

from kappatune_plugin.distributed import ranks
from kappatune_plugin.distributed.lost_ranks import together
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.scanning.cache import Cache, cache_folder
from kappatune_plugin.scanning.lowest import can_settle, settle
from kappatune_plugin.scanning.measure import Bar, measure
from kappatune_plugin.selection.budget import DEFAULT_K
from kappatune_plugin.selection.criteria import ON_ROWS
from kappatune_plugin.selection.ranking import how_to_measure
from kappatune_plugin.selection.report import ABOVE, KappaReport
from kappatune_plugin.selection.selection import check_settings
from kappatune_plugin.weights.model_source import ModelSource
from kappatune_plugin.weights.open_source import ScanFrom, open_source
from kappatune_plugin.weights.patterns import DEFAULT_EXCLUDE, filter_units
from kappatune_plugin.weights.source import Source
from kappatune_plugin.weights.units import WeightUnit


@together("the scan")
def scan(
    model_or_path: nn.Module | ModelSource | str | os.PathLike,
    include: Sequence[str] = (),
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
    rtol: float = 1e-3,
    progress: bool = True,
    trust_remote_code: bool = False,
    cache: bool = True,
    k: Any = None,
    order: str = "lowest",
    rank_by: str = "kappa",
    seed: int = 0,
    scan_from: str | os.PathLike | None = None,
    refuse_more: bool = False,
) -> KappaReport:
    """Measure every weight matrix of a model that `include` and `exclude` leave.

    A matrix of NaN, of zeros or without full rank becomes a row with that status, not an error. With `k`, only what
    `select` with the same settings needs is measured; the remaining rows have the status "above".

    Under torch.distributed all ranks have to call it: each measures its share, and all get the whole report.

    Args:
        model_or_path: a model, the `ModelSource` of one, or the folder or hub name of one. Files are read one tensor
            at a time, in the dtype they were saved in. Weights that bitsandbytes quantized are dequantized.
        include, exclude: groups (`patterns.GROUPS`: "norm", "router", "attention", ...) or globs on unit names; an
            empty `include` means all.
        rtol: relative width of the interval of kappa, see `condition_number`.
        progress: show a bar on stderr.
        trust_remote_code: let transformers run code that comes with the model.
        cache: use results of earlier scans, and keep those of this one; see `cache`.
        k, order, rank_by, seed: what will be selected (see `select`); with k of None everything is measured. rank_by
            "snr" also measures that score.
        scan_from: a folder or hub name of the same model, unquantized, whose values are measured instead. The report's
            `dtype` says so; its `base` stays the model.
        refuse_more: a number `k` above that of the matrices is an error, before any is measured.

    Raises:
        KappaTuneError: the model can't be loaded, a pattern matches nothing, no weight matrix is left, or `rank_by`
            can't be measured by a scan.
    """
    settings = check_settings(DEFAULT_K if k is None else k, order, rank_by, seed)
    budget = settings if k is not None else None
    if rank_by in ON_ROWS:
        raise KappaTuneError(f"rank_by: {rank_by}: a scan can't measure it. {how_to_measure(rank_by)}")
    source = _source(model_or_path, scan_from, trust_remote_code)
    kept, left_out = filter_units(source.units, include, exclude, source.parameters)
    if not kept:
        raise KappaTuneError(_nothing_left(source.units, source.parameters, include, exclude))
    if refuse_more and budget.kind == "count" and budget.value > len(kept):
        raise KappaTuneError(
            f"k = {budget} is more than there is: `include` and `exclude` leave {len(kept)} matrices of the model."
        )
    store = Cache(cache_folder() if cache else None)
    identity = source.identity() if cache else None
    base = {"name": source.name, "hash": _recall(source, store, identity)}
    with Bar(kept, progress) as bar:
        rows_of = partial(measure, source, bar=bar, cache=store, with_snr=rank_by == "snr")
        partly = budget is not None and can_settle(order, rank_by)
        rows = settle(kept, rows_of, rtol, budget, order, rank_by, seed) if partly else rows_of(kept, rtol)
    # the files may have changed while they were read
    if identity is not None and source.identity() == identity and ranks.rank() == 0:
        store.keep_files(identity, base["hash"], source.contents)
    wanted = {"k": budget and budget.written, "order": order, "rank_by": rank_by, "seed": seed}
    made_for = wanted if any(row.status == ABOVE for row in rows) else None
    return KappaReport(rows, base, ", ".join(sorted({source.dtype(unit) for unit in kept})), left_out, made_for)


def _source(
    model_or_path: nn.Module | ModelSource | str | os.PathLike,
    scan_from: str | os.PathLike | None,
    trust_remote_code: bool,
) -> Source:
    source = open_source(model_or_path, trust_remote_code)
    return source if scan_from is None else ScanFrom(source, open_source(os.fspath(scan_from), trust_remote_code))


def _recall(source: Source, cache: Cache, identity: str | None) -> str:
    """The fingerprint of the weights, from the cache if it has the files; then their hashes go to `source.contents`."""
    known = ranks.from_first(cache.files(identity) if identity is not None else None)
    if known is None:
        return source.base_hash()
    source.contents.update(known["contents"])
    return known["base_hash"]


def _nothing_left(
    units: Sequence[WeightUnit], parameters: Sequence[str], include: Sequence[str], exclude: Sequence[str]
) -> str:
    if not units:
        return (
            f"The model has no weight matrix to measure: none of its {len(parameters)} parameters is a 2-D weight in "
            "floating point. If its weights are quantized, scan the unquantized model."
        )
    return (
        f"No weight matrix is left: the model has {len(units)}, include {list(include)} and exclude {list(exclude)} "
        "leave none. Widen `include` or shorten `exclude`."
    )
