"""Training memory of slices against gradient masks on the same model, in one process.

Gradient masks are how stock toolkits train a part of a fused parameter (Axolotl's `unfrozen_parameters` with ranges):
the whole parameter trains and a hook zeroes the rest of its gradient.

    python benchmarks/slice_memory.py
"""

import argparse

import torch
from peft import get_peft_model
from transformers import OlmoeConfig, OlmoeForCausalLM

from kappatune_plugin import KappaTuneConfig, scan, select
from kappatune_plugin.weights.units import find_units, unit_block


def model(layers: int, experts: int, hidden: int) -> OlmoeForCausalLM:
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_experts=experts,
        num_experts_per_tok=2,
    )
    return OlmoeForCausalLM(config)


def bytes_after_a_step(one: torch.nn.Module) -> tuple[int, int]:
    """Bytes of gradients after backward, and of AdamW's state after a step."""
    trainable = [parameter for parameter in one.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable)
    tokens = torch.randint(0, 1024, (2, 64), generator=torch.Generator().manual_seed(0))
    one.train()(input_ids=tokens, labels=tokens).loss.backward()
    gradients = sum(p.grad.untyped_storage().nbytes() for p in trainable if p.grad is not None)
    optimizer.step()
    states = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    return gradients, sum(state.untyped_storage().nbytes() for state in states)


def mask_gradients(one: torch.nn.Module, names: set[str]) -> None:
    """Train the parameters that hold `names`, with the gradient of everything else in them zeroed."""
    one.requires_grad_(False)
    chosen: dict[str, list] = {}
    for unit in find_units(one):
        if unit.name in names:
            chosen.setdefault(unit.parameter, []).append(unit)
    for parameter_name, units in chosen.items():
        parameter = one.get_parameter(parameter_name).requires_grad_(True)
        mask = torch.zeros_like(parameter, dtype=torch.bool)
        for unit in units:
            unit_block(mask, unit).fill_(True)
        parameter.register_hook(lambda gradient, mask=mask: gradient * mask)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--k", type=int, default=24)
    args = parser.parse_args()
    size = (args.layers, args.experts, args.hidden)
    selection = select(scan(model(*size), progress=False), k=args.k, order="random")
    names = {row.name for row in selection.units}
    selected = sum(rows * columns for rows, columns in (row.shape for row in selection.units))
    masked, sliced = model(*size), model(*size)
    mask_gradients(masked, names)
    measured = {
        "gradient masks": bytes_after_a_step(masked),
        "slices": bytes_after_a_step(get_peft_model(sliced, KappaTuneConfig(selection=selection.to_dict()))),
    }
    total = sum(parameter.numel() for parameter in masked.parameters())
    print(
        f"{total / 1e6:.1f}M parameters, {selected / 1e6:.2f}M selected in {args.k} of {len(selection.reasons)} units"
    )
    for name, (gradients, state) in measured.items():
        print(f"{name:15} gradients {gradients / 2**20:7.1f} MiB   AdamW state {state / 2**20:7.1f} MiB")
    ratios = [measured["gradient masks"][i] / measured["slices"][i] for i in range(2)]
    print(f"ratio           gradients {ratios[0]:7.1f} x     AdamW state {ratios[1]:7.1f} x")


if __name__ == "__main__":
    main()
