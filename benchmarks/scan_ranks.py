"""How much faster two ranks scan than one, one thread each, on the matrices of an OLMoE-shaped stack.

    python benchmarks/scan_ranks.py [--layers 1] [--experts 16] [--rounds 3]

Each rank holds the whole model, as under DDP. The runs with one and with two ranks alternate; the best of each counts.
Beside the time it prints the processor time of the busiest rank: on a machine that does something else as well, two
ranks have no second core to gain, but the work of one can still be seen to be halved.
"""

import argparse
import os
import socket
import sys
import time
from datetime import timedelta

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import AutoModelForCausalLM, OlmoeConfig

from kappatune_plugin import scan

# of allenai/OLMoE-1B-7B-0924
HIDDEN, INTERMEDIATE, HEADS = 2048, 1024, 16


def model(layers: int, experts: int) -> torch.nn.Module:
    config = OlmoeConfig(
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        num_experts=experts,
        num_experts_per_tok=min(2, experts),
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def run(rank: int, world: int, port: int, arguments: argparse.Namespace, seconds: mp.SimpleQueue) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, world, rank == 0, timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    stack = model(arguments.layers, arguments.experts)
    dist.barrier()
    start, busy = time.perf_counter(), time.process_time()
    scan(stack, progress=False, cache=False)
    mine = time.perf_counter() - start, time.process_time() - busy
    everyone: list[tuple[float, float] | None] = [None] * world
    dist.all_gather_object(everyone, mine)
    if rank == 0:
        seconds.put(tuple(max(each) for each in zip(*everyone, strict=True)))
    dist.destroy_process_group()


def measure(world: int, arguments: argparse.Namespace) -> tuple[float, float]:
    """Wall-clock seconds, and CPU seconds of the busiest rank."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    seconds = mp.get_context("spawn").SimpleQueue()
    mp.spawn(run, (world, port, arguments, seconds), nprocs=world)
    return seconds.get()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    found: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
    for _ in range(arguments.rounds):
        for world in found:
            found[world].append(measure(world, arguments))
            wall, busy = found[world][-1]
            print(f"{world} rank(s): {wall:.1f} s, processor {busy:.1f} s", file=sys.stderr, flush=True)
    for position, what in enumerate(("time", "processor time of the busiest rank")):
        one, two = (min(each[position] for each in found[world]) for world in found)
        print(f"{what}: 1 rank {one:.1f} s, 2 ranks {two:.1f} s, {one / two:.2f}x")


if __name__ == "__main__":
    main()
