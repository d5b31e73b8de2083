"""Condition numbers of a model: PEFT's KappaTuneSelector and this package's scan on the same weights in one process.

    python benchmarks/scan.py                       # two stacks of LLM shapes and one of small matrices, in minutes
    python benchmarks/scan.py --stacks olmoe --layers 1 --profile
    python benchmarks/scan.py --device cuda --full  # OLMoE-1B-7B's and Llama-7B's shapes, every layer

Weights are random with an LLM-like spectrum: Gaussian, rows and columns scaled by log-normal factors, four outlying
directions. The contestants take turns; a ratio is that of the medians over the rounds. "svdvals, tall" is
torch.linalg.svdvals on the orientation that suits it (PEFT calls it on the weights as they lie, which takes twice as
long for wide ones). The K lowest are compared with those of a float64 SVD, for every K.
"""

import argparse
import cProfile
import os
import pstats
import statistics
import time
from collections.abc import Callable

import torch
from peft.helpers import KappaTuneSelector
from torch import Tensor, nn

from kappatune_plugin import scan
from kappatune_plugin.condition.number import condition_number
from kappatune_plugin.distributed.work import cost
from kappatune_plugin.weights.open_source import open_source

# (name, rows, columns, number) in one layer; OLMoE-1B-7B has 64 experts, Llama-7B's MLP has 11008 rows
OLMOE = {"attention": (2048, 2048, 4), "gate_up": (1024, 2048, 128), "down": (2048, 1024, 64)}
LLAMA_7B = {"attention": (4096, 4096, 4), "gate_up": (11008, 4096, 2), "down": (4096, 11008, 1)}
QUICK = {
    "olmoe": {"attention": (2048, 2048, 1), "gate_up": (1024, 2048, 32), "down": (2048, 1024, 16)},
    "llama": {"q_o": (4096, 4096, 1), "k_v": (4096, 1024, 1), "gate_up": (14336, 4096, 1)},
    "small": {"square": (128, 128, 40), "wide": (128, 512, 20), "tall": (512, 128, 20), "larger": (384, 384, 20)},
}
FULL = {"olmoe": (OLMOE, 16), "llama": (LLAMA_7B, 32)}
# what --profile adds up: functions of the engine, under their own name
STAGES = {
    "gram": "A^T A",
    "_gram": "A^T A (batched)",
    "of": "LU or Cholesky factor",
    "_inverse_factor": "Cholesky factor and its inverse (batched)",
    "block_lanczos": "Lanczos, both ends",
    "_ritz_pairs": "Lanczos, both ends (batched)",
    "_below": "defect of the factor",
    "_smallest": "residuals against W, Davidson",
    "from_eigenvalues": "eigenvalues (small matrices)",
    "from_svd": "float64 SVD",
}


def llm_like(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """(rows, columns), float32, on the generator's device."""
    options = {"generator": generator, "device": generator.device}
    w = torch.randn(rows, columns, **options)
    w *= torch.exp(0.3 * torch.randn(rows, 1, **options)) * torch.exp(0.4 * torch.randn(1, columns, **options))
    for strength in (6.0, 4.0, 3.0, 2.0):
        left, right = torch.randn(rows, 1, **options), torch.randn(1, columns, **options)
        w += strength * max(rows, columns) ** 0.5 * (left / left.norm()) * (right / right.norm())
    return 0.02 * w


def model_of(
    layer: dict[str, tuple[int, int, int]], layers: int, device: str, dtype: torch.dtype, seed: int
) -> nn.Module:
    """A model of bias-free nn.Linear layers that both programs accept; experts as single modules."""
    generator = torch.Generator(device).manual_seed(seed)
    model = nn.Module()
    for index in range(layers):
        block = nn.Module()
        for name, (rows, columns, number) in layer.items():
            group = nn.ModuleList()
            for _ in range(number):
                linear = nn.Linear(columns, rows, bias=False, device="meta")
                linear.weight = nn.Parameter(llm_like(rows, columns, generator).to(dtype), requires_grad=False)
                group.append(linear)
            block.add_module(name, group)
        model.add_module(f"layer{index}", block)
    return model


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: module.weight for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def by_peft(model: nn.Module) -> dict[str, float]:
    selector = KappaTuneSelector(model, show_progress=False)
    selector.get_best_targets()
    return selector._condition_numbers


def by_svdvals(model: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    found = {}
    for name, w in weights(model).items():
        sigma = torch.linalg.svdvals((w if w.shape[0] >= w.shape[1] else w.mT).to(dtype))
        found[name] = (sigma[0] / sigma[-1]).item()
    return found


def by_scan(model: nn.Module) -> dict[str, float]:
    report = scan(model, exclude=(), progress=False, cache=False)
    return {unit.name.removesuffix(".weight"): unit.kappa for unit in report.units}


def timed(contestant: Callable[[nn.Module], dict[str, float]], model: nn.Module) -> tuple[float, dict[str, float]]:
    """Seconds, and kappa by name."""
    synchronize(model)
    start = time.perf_counter()
    kappas = contestant(model)
    synchronize(model)
    return time.perf_counter() - start, kappas


def synchronize(model: nn.Module) -> None:
    if next(model.parameters()).is_cuda:
        torch.cuda.synchronize()


def equal_sets(found: dict[str, float], truth: dict[str, float]) -> str:
    """For how many K both have the same K lowest."""
    order, right = sorted(found, key=found.get), sorted(truth, key=truth.get)
    equal = sum(set(order[:k]) == set(right[:k]) for k in range(1, len(right) + 1))
    return f"{equal} of {len(right)}"


def compare(name: str, model: nn.Module, rounds: int, peer: bool, truth: bool) -> None:
    contestants = {"scan": by_scan}
    if peer:
        contestants = {"peft": by_peft, "svdvals, tall": by_svdvals, **contestants}
    seconds: dict[str, list[float]] = {label: [] for label in contestants}
    kappas = {}
    by_scan(model)  # the first call of a library or a GPU pays for its start
    for _ in range(rounds):
        for label, contestant in contestants.items():
            spent, kappas[label] = timed(contestant, model)
            seconds[label].append(spent)
    medians = {label: statistics.median(spent) for label, spent in seconds.items()}
    shapes = sorted({tuple(w.shape) for w in weights(model).values()})
    print(f"\n{name}: {len(weights(model))} matrices, {', '.join(f'{m}x{n}' for m, n in shapes)}, {rounds} rounds")
    right = by_svdvals(model, torch.float64) if truth else None
    for label, median in medians.items():
        spread = f"{min(seconds[label]):.2f} to {max(seconds[label]):.2f}"
        ratio = f"{median / medians['scan']:6.2f} x scan's time" if label != "scan" else " " * 19
        sets = f"   same K lowest as float64: {equal_sets(kappas[label], right)}" if right else ""
        print(f"  {label:14} {median:8.2f} s ({spread})  {ratio}{sets}", flush=True)


def profile(model: nn.Module) -> None:
    """Profile of the engine on one matrix after another, in one thread (on a GPU, synchronized after each kernel)."""
    source, threads = open_source(model), torch.get_num_threads()
    profiler = cProfile.Profile()
    torch.set_num_threads(1)
    longest_first = sorted(source.units, key=lambda unit: -cost(unit))
    start = time.perf_counter()
    for unit in longest_first:
        matrix = source.load(unit)
        profiler.runcall(condition_number, matrix)
    total = time.perf_counter() - start
    torch.set_num_threads(threads)
    spent = dict.fromkeys(STAGES.values(), 0.0)
    for (path, _, function), row in pstats.Stats(profiler).stats.items():
        if "kappatune_plugin" in path and function in STAGES:
            spent[STAGES[function]] += outermost(row, function)
    print(f"  by stage, one thread, {total:.2f} s:")
    for stage, seconds in sorted(spent.items(), key=lambda item: -item[1]):
        if seconds > 0:
            print(f"    {stage:45} {seconds / total:6.1%}")
    print(f"    {'everything else':45} {1 - sum(spent.values()) / total:6.1%}")


def outermost(row: tuple, function: str) -> float:
    """Cumulative seconds of a function; of a recursive one without its own calls."""
    callers = {name: each for name, each in row[4].items() if name[2] != function}
    return sum(each[3] for each in callers.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stacks", nargs="+", choices=QUICK, default=list(QUICK))
    parser.add_argument("--layers", type=int, default=1, help="how often a stack is repeated")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="of torch, for every contestant")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"), help="how the weights are stored"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--full", action="store_true", help="every layer of OLMoE-1B-7B and Llama-7B")
    parser.add_argument("--no-peer", action="store_true", help="time the scan only")
    parser.add_argument("--no-truth", action="store_true", help="leave out the float64 SVDs")
    parser.add_argument("--profile", action="store_true", help="print the time by stage")
    args = parser.parse_args()
    if args.profile and args.device != "cpu":
        os.environ["CUDA_LAUNCH_BLOCKING"] = "1"
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} threads, {args.device}, {args.dtype}")
    for name in args.stacks:
        if args.full and name not in FULL:
            continue
        layer, layers = FULL[name] if args.full else (QUICK[name], args.layers)
        model = model_of(layer, layers, args.device, getattr(torch, args.dtype), args.seed)
        compare(name, model, args.rounds, not args.no_peer, not args.no_truth)
        if args.profile:
            profile(model)
        del model


if __name__ == "__main__":
    main()
