"""Time and peak memory of a training step at equal trainable counts, in one process, on one mixture of experts.

KappaTune's slices, whole and as low-rank pairs, beside PEFT's LoRA on all linear layers and PEFT's LoRA on all experts
at once (`target_parameters`, which is how LoRA reaches fused experts). Steps of all are taken in turn; a line shows the
median time, its ratio to LoRA on all linear layers, and how far the memory rose above what lay there before the step.

    python benchmarks/step.py [--layers 4] [--experts 32] [--hidden 512] [--tokens 1024] [--k 24] [--rounds 10]
"""

import argparse
import ctypes
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import OlmoeConfig, OlmoeForCausalLM

from kappatune_plugin import KappaTuneConfig

VOCABULARY, HEADS, ACTIVE, LENGTH = 1024, 8, 4, 128
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def model(args: argparse.Namespace, implementation: str) -> OlmoeForCausalLM:
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=args.hidden,
        intermediate_size=args.hidden // 2,
        num_hidden_layers=args.layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        num_experts=args.experts,
        num_experts_per_tok=ACTIVE,
    )
    return OlmoeForCausalLM._from_config(config, experts_implementation=implementation).to(args.device)


def methods(args: argparse.Namespace, implementation: str) -> Iterator[tuple[str, torch.nn.Module]]:
    """Name and model of each, LoRA's ranks chosen so that as many values are trained as the slices have."""
    ours = adapted(args, implementation, KappaTuneConfig(k=args.k, include=["*.experts.*"]))
    wanted = trainable(ours)
    yield "KappaTune, slices", ours
    pairs = KappaTuneConfig(k=args.k, include=["*.experts.*"], adapter="lora", match={"params": wanted})
    yield "KappaTune, pairs beside slices", adapted(args, implementation, pairs)
    for name, where in (
        ("LoRA, all linear layers", {"target_modules": "all-linear"}),
        ("LoRA, all experts", {"target_modules": [], "target_parameters": EXPERTS}),
    ):
        one = trainable(adapted(args, implementation, LoraConfig(r=1, **where)))
        yield name, adapted(args, implementation, LoraConfig(r=max(1, round(wanted / one)), **where))


def adapted(args: argparse.Namespace, implementation: str, config: PeftConfig) -> torch.nn.Module:
    return get_peft_model(model(args, implementation), config).train()


def trainable(one: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in one.parameters() if parameter.requires_grad)


def step(one: torch.nn.Module, optimizer: torch.optim.Optimizer, tokens: torch.Tensor) -> tuple[float, float]:
    """Seconds, and MiB above what was in use before."""
    before = _start(tokens.device)
    started = time.perf_counter()
    one(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if tokens.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started, (_peak(tokens.device) - before) / 2**20


def _start(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    # Linux: what was freed goes back to the system, and the peak starts anew
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _peak(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"layers": 4, "experts": 32, "hidden": 512, "tokens": 1024, "k": 24, "rounds": 10}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    tokens = torch.randint(VOCABULARY, (args.tokens // LENGTH, LENGTH), generator=torch.Generator().manual_seed(0))
    table = Table("experts", "method", "trained", "ms a step", "of LoRA's", "MiB above the start", "of LoRA's")
    for implementation in ("grouped_mm", "eager"):
        each = {name: one for name, one in methods(args, implementation)}
        optimizers = {
            name: torch.optim.AdamW([parameter for parameter in one.parameters() if parameter.requires_grad])
            for name, one in each.items()
        }
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in each}
        for _ in range(args.rounds + 1):
            for name, one in each.items():
                found[name].append(step(one, optimizers[name], tokens.to(args.device)))
        # the first step of each makes its optimizer's state
        medians = {name: [median(values) for values in zip(*steps[1:], strict=True)] for name, steps in found.items()}
        seconds, memory = medians["LoRA, all linear layers"]
        for name, (taken, above) in medians.items():
            figures = f"{1000 * taken:.0f}", f"{taken / seconds:.2f}", f"{above:.0f}", f"{above / memory:.2f}"
            table.add_row(implementation, name, f"{trainable(each[name]):,}", *figures)
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
