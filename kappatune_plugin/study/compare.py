"""A comparison: every method at its best learning rate, on the same data order, at the same training loss."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.recipe.public import public_yaml
from kappatune_plugin.selection.names import layer_and_type
from kappatune_plugin.study.bench import Bench
from kappatune_plugin.study.method_configs import choose
from kappatune_plugin.study.methods import Method
from kappatune_plugin.study.settings import Settings, Tried
from kappatune_plugin.study.store import RunStore
from kappatune_plugin.study.summary import first_crossing, or_infinite, smoothed, summarize
from kappatune_plugin.study.training import train_run
from kappatune_plugin.weights.units import find_units

BAR = "{l_bar}{bar}| [{elapsed}<{remaining}{postfix}]"
PACKAGES = ("torch", "transformers", "trl", "peft", "kappatune-plugin")


def compare(bench: Bench, methods: Sequence[Method], settings: Settings, output_dir: Path) -> dict[str, Any]:
    """Do the runs that aren't finished yet, and put the results together.

    Returns:
        The content of compare.json.

    Raises:
        KappaTuneError: a method that doesn't fit the model, runs that didn't see the same data in the same order.
    """
    store = RunStore(output_dir / "runs")
    # what may turn out needless counts from the start, so that the bar never falls back
    of_method = len(settings.learning_rates) + settings.widen + 2 * len(settings.seeds) - 1
    with tqdm(total=len(methods) * of_method, desc="runs", bar_format=BAR) as bar:
        runner = _Runner(bench, settings, store, bar)
        tried = [runner.best(method) for method in methods]
        _check_order(bench, tried)
        target = settings.target_loss if settings.target_loss is not None else _common_target(tried, settings.smooth)
        tried = [runner.at_target(each, target) for each in tried]
    return {
        "recipe": yaml.safe_load(public_yaml(bench.recipe.resolved)),
        "settings": settings.model_dump(mode="json"),
        "target_loss": target,
        "steps": max(len(run["losses"]) for each in tried for run in each.runs),
        "versions": {name: version(name) for name in PACKAGES},
        "hashes": bench.hashes,
        "parameters": sum(parameter.numel() for parameter in bench.base.parameters()),
        "matched_parameters": bench.pool.values,
        "before": runner.before(),
        "methods": [{**summarize(each, runner.before(), settings), "trains": runner.trains(each)} for each in tried],
    }


class _Runner:
    """Makes runs, or takes them from the store."""

    def __init__(self, bench: Bench, settings: Settings, store: RunStore, bar: Any) -> None:
        self.bench, self.settings, self.store, self.bar = bench, settings, store, bar
        self.done = 0
        self._identity = {"bench": bench.identity, "versions": {name: version(name) for name in PACKAGES}}

    def before(self) -> dict[str, float]:
        """The measurements of the base."""
        identity = {**self._identity, "what": "before"}
        return self.store.get("before", identity, self.bench.before)

    def trains(self, tried: Tried) -> dict[str, int] | None:
        """Type of matrix -> how many a KappaTune method trains with the first seed; None for other methods."""
        if tried.method.kind != "kappatune":
            return None
        units = find_units(self.bench.base, quantized=True)
        selection = choose(tried.method, self.bench.pool, units, self.settings.seeds[0])
        return dict(Counter(layer_and_type(unit.name)[1] for unit in selection.units))

    def best(self, method: Method) -> Tried:
        """`method` with all seeds, at the learning rate of lowest validation loss with the first seed."""
        seeds, rates = self.settings.seeds, sorted(self.settings.learning_rates)
        grid: dict[float, dict[str, Any]] = {}
        for rate in reversed(rates):
            grid[rate] = self._run(method, rate, seeds[0], below=lowest_loss(grid))
        for left in range(self.settings.widen, 0, -1):
            beyond = rate_beyond({rate: run["validation_loss"] for rate, run in grid.items()})
            if beyond is None:
                self._count(left)
                break
            grid[beyond] = self._run(method, beyond, seeds[0], below=lowest_loss(grid))
        chosen = best_rate({rate: run["validation_loss"] for rate, run in grid.items()})
        runs = [grid[chosen], *(self._run(method, chosen, seed) for seed in seeds[1:])]
        return Tried(method, chosen, runs, grid, [None] * len(seeds))

    def at_target(self, tried: Tried, target: float | None) -> Tried:
        """`tried` with the measurements right after the step at which each run first reaches `target`."""
        matched = []
        for seed, run in zip(self.settings.seeds, tried.runs, strict=True):
            curve = smoothed(run["losses"], self.settings.smooth)
            step = None if target is None else first_crossing(curve, target)
            matched.append(None if step is None else self._state_at(tried, run, seed, step))
        self._count(sum(each is None for each in matched))
        return replace(tried, matched=matched)

    def _state_at(self, tried: Tried, run: dict[str, Any], seed: int, step: int) -> dict[str, Any]:
        """The measurements of `run` after `step`: its own, or those of the same run repeated up to there."""
        # slow measurements are left out during a run, so only its last point has all
        for point in [run["at_target"], *run["points"][-1:]]:
            if point is not None and point["step"] == step:
                self._count()
                return {**point, "replay_error": 0.0}
        again = self._run(tried.method, tried.learning_rate, seed, stop_at=step)
        # None is a loss that wasn't finite
        pairs = [(a, b) for a, b in zip(run["losses"], again["losses"], strict=False) if None not in (a, b)]
        return {**again["points"][0], "replay_error": max(abs(a - b) for a, b in pairs)}

    def _run(
        self, method: Method, rate: float, seed: int, stop_at: int | None = None, below: float = math.inf
    ) -> dict[str, Any]:
        every = self.settings.every
        identity = {
            **self._identity,
            # runs of before this could be set are still these runs
            "method": {key: value for key, value in asdict(method).items() if (key, value) != ("replay", None)},
            "learning_rate": rate,
            "seed": seed,
            "every": None if stop_at else every,
            "stop_at": stop_at,
        }
        title = f"{method.name}-lr{rate:g}-seed{seed}" + (f"-to{stop_at}" if stop_at else "")
        self.bar.set_postfix_str(title)
        target, stops = self.settings.target_loss, self.settings.stop_at_target
        # a target known beforehand is measured on the way, which changes nothing in the run unless it ends there
        crossing = None if target is None or stop_at else (self.settings.smooth, target)
        if stops:
            identity["stops"] = crossing
        frontier = None if stop_at else self.settings.frontier
        # runs of before this could be set are still these runs
        if frontier is not None:
            identity["frontier"] = frontier.model_dump(mode="json")
        if frontier is not None and below < math.inf:
            identity["frontier_below"] = below
        how = (every, stop_at, crossing, stops, frontier, below, self._within)
        run = self.store.get(title, identity, lambda: train_run(self.bench, method, rate, seed, *how))
        self._count()
        return run

    def _count(self, runs: int = 1) -> None:
        """So many runs are done, or turned out needless."""
        self.done += runs
        self._within(0.0)

    def _within(self, share: float) -> None:
        """The bar moves on to that share of the next run."""
        self.bar.update(max(0.0, self.done + share - self.bar.n))


def lowest_loss(runs: Mapping[float, Mapping[str, Any]]) -> float:
    """The lowest loss on held-out rows; infinite without one."""
    return min((or_infinite(run["validation_loss"]) for run in runs.values()), default=math.inf)


def best_rate(losses: Mapping[float, float | None]) -> float:
    """The rate of lowest loss, the lower one in a tie; the lowest rate if every loss is None (diverged)."""
    return min(sorted(losses), key=lambda rate: or_infinite(losses[rate]))


def rate_beyond(losses: Mapping[float, float | None]) -> float | None:
    """The next rate beyond the best one, at the same ratio as its neighbour; None if the best isn't at an edge."""
    rates, best = sorted(losses), best_rate(losses)
    neighbours = {rates[0]: rates[1], rates[-1]: rates[-2]}
    return float(f"{best * best / neighbours[best]:.2g}") if best in neighbours else None


def _common_target(tried: Iterable[Tried], window: int) -> float | None:
    """The highest of the runs' lowest smoothed losses; None if no run has one."""
    lowest = [min(smoothed(run["losses"], window)) for each in tried for run in each.runs]
    return max(filter(math.isfinite, lowest), default=None)


def _check_order(bench: Bench, tried: Sequence[Tried]) -> None:
    # with other text mixed in, batches are others
    alike: dict[str, list[Tried]] = {}
    for each in tried:
        alike.setdefault(str(bench.replay(each.method)), []).append(each)
    for first, *others in (runs for group in alike.values() for runs in zip(*(one.runs for one in group), strict=True)):
        # runs may be of different lengths
        pairs = [pair for run in others for pair in zip(first["order"], run["order"], strict=False)]
        if any(one != other for one, other in pairs):
            raise KappaTuneError(
                "The methods didn't see the same batches in the same order: their comparison would mean nothing. "
                "Please report this with the recipe."
            )
