"""A mixture of experts with real knowledge: a dense model's MLPs divided into experts, then distilled.

The neurons of each MLP are clustered by their gate and up weights into experts of equal size; a router chooses some of
them a token (Mixtral's architecture). Router and experts first learn each MLP's output from its input, all layers at
once, then the dense model's distribution of the next token. The text is WikiText's validation part and what the dense
model writes; WikiText's test part tells the quality, which quality.json in the folder keeps beside the dense model's.

    python benchmarks/mixture.py DENSE OUTPUT [--data DATA] [--experts 8] [--active 6] [--seed 0] \
        [--steps 450 --batch 64 --written 8192]

On a GPU, as above, SmolLM2-135M's loss on WikiText rises from 3.89 to 4.22: the mixture of docs/RESULTS.md, whose
quality.json is docs/results/mixture-quality.json. A CPU core takes 20 minutes for the defaults, which are a fiftieth of
that text, and gets to 4.55. With 4 of 8 experts active it was far worse throughout. The folder is made whole or not at
all.
"""

import argparse
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from study import REPOSITORY
from torch import Tensor, nn
from torch.nn.functional import kl_div, mse_loss
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

from kappatune_plugin.files import write_json
from kappatune_plugin.forgetting.measures import blocks, sample_base
from kappatune_plugin.model_folder import check_free, publish, staging

LENGTH, ROUNDS = 128, 8
# pieces of text that quality is measured on at once, and that the dense model writes at once
AT_ONCE, WRITTEN_AT_ONCE = 4, 1024
RATES = {"experts": 5e-4, "gate": 3e-3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared" / "data")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--active", type=int, default=6)
    parser.add_argument("--steps", type=int, default=150, help="of the second part; the first takes a third")
    parser.add_argument("--batch", type=int, default=4, help="pieces of text a step, each of 128 tokens")
    parser.add_argument("--written", type=int, default=64, help="of the pieces that the dense model writes")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    check_free(args.output, [args.dense], overwrite=False)
    torch.manual_seed(args.seed)
    # half the time of the defaults on a CPU
    torch.set_float32_matmul_precision("medium")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dense = AutoModelForCausalLM.from_pretrained(args.dense, dtype=torch.float32, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(args.dense)
    valid, test = (
        blocks(tokenizer, [(args.data / "text" / "wikitext-2" / name).read_text("utf-8")], LENGTH, False)
        for name in ("valid.txt", "raw_test.txt")
    )
    mixture = divided(dense, args.experts, args.active, args.seed).to(device)
    pieces = valid + sample_base(dense.to(device), tokenizer, args.written, LENGTH, args.seed, WRITTEN_AT_ONCE)
    pieces = [piece for piece in pieces if len(piece) == LENGTH]
    distill(dense, mixture, batches(pieces, args.batch, args.seed), args.steps)
    unseen = torch.tensor(random.Random(0).sample([piece for piece in test if len(piece) == LENGTH], 64)).to(device)
    quality = {"tokens": unseen.numel(), "dense": loss(dense, unseen), "mixture": loss(mixture, unseen)}
    with staging(args.output) as folder:
        mixture.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_json(folder / "quality.json", quality)
        publish(folder, args.output)
    print(quality)


def divided(dense: nn.Module, experts: int, active: int, seed: int) -> MixtralForCausalLM:
    """The dense model with each MLP divided into experts; of equal weight and all active it would be the same."""
    config = dense.config.to_dict()
    kept = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    kept += ("rope_parameters", "rms_norm_eps", "hidden_act", "max_position_embeddings", "tie_word_embeddings")
    kept += ("bos_token_id", "eos_token_id", "pad_token_id")
    size = config["intermediate_size"] // experts
    mixture = MixtralForCausalLM(
        MixtralConfig(
            **{key: config[key] for key in kept},
            intermediate_size=size,
            num_local_experts=experts,
            num_experts_per_tok=active,
            sliding_window=None,
            attn_implementation="eager",
        )
    ).eval()
    same = {key: value for key, value in dense.state_dict().items() if ".mlp." not in key}
    mixture.load_state_dict(same, strict=False)
    random = np.random.default_rng(seed)
    for source, layer in zip(tqdm(dense.model.layers, desc="Clusters of neurons"), mixture.model.layers, strict=True):
        gate, up, down = (getattr(source.mlp, f"{name}_proj").weight.detach() for name in ("gate", "up", "down"))
        groups, target = clusters(torch.cat([gate, up], 1), experts, random), layer.mlp
        with torch.no_grad():
            for expert, rows in enumerate(groups):
                target.experts.gate_up_proj[expert] = torch.cat([gate[rows], up[rows]])
                # the weights of the active experts sum to 1
                target.experts.down_proj[expert] = active * down[:, rows]
            target.gate.weight.normal_(0, 0.01)
    return mixture


def clusters(neurons: Tensor, count: int, random: np.random.Generator) -> list[Tensor]:
    """Rows in `count` groups of equal size, by k-means of their directions with balanced assignment."""
    rows = nn.functional.normalize(neurons, dim=1).double().numpy()
    size = len(rows) // count
    centers = rows[random.choice(len(rows), count, replace=False)]
    for _ in range(ROUNDS):
        _, places = linear_sum_assignment(-np.repeat(rows @ centers.T, size, axis=1))
        groups = places // size
        centers = np.stack([rows[groups == group].mean(0) for group in range(count)])
    return [torch.from_numpy(np.flatnonzero(groups == group)) for group in range(count)]


def batches(pieces: Sequence[Sequence[int]], size: int, seed: int) -> Iterator[Tensor]:
    """Mini-batches without end, each piece once before any comes again."""
    dealt = random.Random(seed)
    while True:
        order = dealt.sample(list(pieces), len(pieces))
        for first in range(0, len(order) - size + 1, size):
            yield torch.tensor(order[first : first + size])


def distill(dense: nn.Module, mixture: nn.Module, texts: Iterator[Tensor], steps: int) -> None:
    """Train router and experts: first each layer on its own, then all together; the rest stays the dense model's."""
    mixture.requires_grad_(False)
    trained = {name: each for name, each in mixture.named_parameters() if ".mlp." in name}
    groups: dict[float, list[Tensor]] = {}
    for name, each in trained.items():
        groups.setdefault(RATES["gate" if "gate.weight" in name else "experts"], []).append(each.requires_grad_())
    for part, count in ((by_layer, steps // 3), (by_distribution, steps)):
        optimizer = torch.optim.AdamW([{"params": each, "lr": rate} for rate, each in groups.items()], weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, count)
        with tqdm(range(count), desc=part.__doc__.partition(",")[0]) as bar:
            for _ in bar:
                found = part(dense, mixture, next(texts).to(mixture.device))
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                bar.set_postfix(loss=f"{found:.3f}")


def by_layer(dense: nn.Module, mixture: nn.Module, ids: Tensor) -> float:
    """Each MLP alone, from its input in the dense model to its output there; the mean relative squared error."""
    seen: list[tuple[Tensor, Tensor]] = []
    hooks = [
        layer.mlp.register_forward_hook(lambda _, given, output: seen.append((given[0], output)))
        for layer in dense.model.layers
    ]
    with torch.no_grad():
        dense.model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    total = 0.0
    for layer, (given, output) in zip(mixture.model.layers, seen, strict=True):
        error = mse_loss(layer.mlp(given), output) / output.square().mean()
        error.backward()
        total += error.item()
    return total / len(seen)


def by_distribution(dense: nn.Module, mixture: nn.Module, ids: Tensor) -> float:
    """All layers, from the dense model's distribution of the next token; KL in nats a token."""
    with torch.no_grad():
        known = dense(input_ids=ids, use_cache=False).logits.log_softmax(-1).flatten(0, 1)
    said = mixture(input_ids=ids, use_cache=False).logits.log_softmax(-1).flatten(0, 1)
    divergence = kl_div(said, known, reduction="batchmean", log_target=True)
    divergence.backward()
    return divergence.item()


@torch.no_grad()
def loss(model: nn.Module, ids: Tensor) -> float:
    """Nats a token."""
    return float(np.mean([model(input_ids=each, labels=each).loss.item() for each in ids.split(AT_ONCE)]))


if __name__ == "__main__":
    main()
