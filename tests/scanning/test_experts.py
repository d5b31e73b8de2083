"""rank_by: expert_share and expert_gate, against counting token by token."""

import json

import pytest
import torch
from datasets import Dataset
from torch import nn

from helpers import training
from helpers.command import kappatune
from helpers.tiny import tiny_model, tiny_tokenizer
from kappatune_plugin import KappaReport, KappaTuneError, scan, select
from kappatune_plugin.scanning.experts import GATE, SHARE, expert_of, expert_use, with_expert_use
from kappatune_plugin.scanning.gain import GainConfig, to_example
from kappatune_plugin.study.bench import Bench
from kappatune_plugin.study.method_configs import choose
from kappatune_plugin.study.methods import parse_methods
from kappatune_plugin.weights.units import find_units

PAIRS = [(f"the cat {i} sat on the", f" {word}<eos>") for i in range(3) for word in ("mat", "rug")]
CONFIG = GainConfig(examples=4, max_length=12)
KINDS = ["mixtral", "olmoe", "qwen3_moe"]


class Expert(nn.Module):
    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        super().__init__()
        for name, weight in zip(("gate_proj", "up_proj", "down_proj"), (*gate_up.chunk(2), down), strict=True):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight = nn.Parameter(weight.detach().clone())
            self.add_module(name, linear)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(states)) * self.up_proj(states))


class SeparateMoe(nn.Module):
    """A mixture as transformers 4 has it: a linear layer as gate, a module for each expert."""

    def __init__(self, fused: nn.Module, top: int, normed: bool) -> None:
        super().__init__()
        self.top, self.normed = top, normed
        self.gate = nn.Linear(*reversed(fused.gate.weight.shape), bias=False)
        self.gate.weight = nn.Parameter(fused.gate.weight.detach().clone())
        pairs = zip(fused.experts.gate_up_proj, fused.experts.down_proj, strict=True)
        self.experts = nn.ModuleList(Expert(gate_up, down) for gate_up, down in pairs)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        flat = states.reshape(-1, states.shape[-1])
        scores, chosen = self.gate(flat).float().softmax(-1).topk(self.top)
        if self.normed:
            scores = scores / scores.sum(-1, keepdim=True)
        rows = [
            sum(score * self.experts[int(number)](token) for score, number in zip(*each, strict=True))
            for token, each in zip(flat, zip(scores, chosen, strict=True), strict=True)
        ]
        return torch.stack(rows).reshape(states.shape)


def separate(kind: str) -> nn.Module:
    model = tiny_model(kind, vocab_size=300)
    normed = getattr(model.config, "norm_topk_prob", True)
    for layer in model.model.layers:
        layer.mlp = SeparateMoe(layer.mlp, model.config.num_experts_per_tok, normed)
    return model


@torch.no_grad()
def counted(model: nn.Module, examples: list[list[int]]) -> dict[tuple[int, int], tuple[float, float]]:
    """(layer, expert) -> (share of tokens, mean gate), from the hidden states that go into each layer's mixture."""
    top, normed = model.config.num_experts_per_tok, getattr(model.config, "norm_topk_prob", True)
    states: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    for place, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda module, inputs, place=place: states[place].append(inputs[0][0]))
    for ids in examples:
        model(torch.tensor([ids]))
    found = {}
    for place, layer in enumerate(model.model.layers):
        tokens = torch.cat(states[place])
        for expert in range(8):
            hits, gates = 0, 0.0
            for token in tokens:
                scores = (layer.mlp.gate.weight @ token).softmax(0)
                best = sorted(range(8), key=lambda number: -scores[number])[:top]
                if expert in best:
                    hits += 1
                    gates += (scores[expert] / (scores[best].sum() if normed else 1)).item()
            found[place, expert] = hits / len(tokens), gates / len(tokens)
    return found


def examples() -> list[list[int]]:
    order = torch.randperm(len(PAIRS), generator=torch.Generator().manual_seed(0)).tolist()[:4]
    return [to_example(tiny_tokenizer(), *PAIRS[place], 12)[0] for place in order]


@pytest.mark.parametrize("form", ["fused", "separate"])
@pytest.mark.parametrize("kind", KINDS)
def test_shares_and_gates_against_counting(kind, form):
    model = (tiny_model(kind, vocab_size=300) if form == "fused" else separate(kind)).eval()
    found = expert_use(model, tiny_tokenizer(), PAIRS, CONFIG)
    slow = counted(model, examples())
    units = {unit.name: expert_of(unit) for unit in find_units(model) if ".experts." in unit.name}
    assert found.keys() == units.keys() and len(found) == 2 * 8 * 3
    for name, (block, number) in units.items():
        share, gate = slow[int(block.split(".")[2]), number]
        assert found[name] == {SHARE: pytest.approx(share, abs=1e-12), GATE: pytest.approx(gate, abs=1e-5)}
    assert sum(share for share, _ in slow.values()) == pytest.approx(2 * model.config.num_experts_per_tok)
    assert len({share for share, _ in slow.values()}) > 3


@pytest.mark.parametrize("kind", ["deepseek_v2", "deepseek_v3", "gpt_oss"])
def test_other_routers_send_as_many_tokens_as_they_choose(kind):
    model = tiny_model(kind, vocab_size=300)
    found = expert_use(model, tiny_tokenizer(), PAIRS, CONFIG)
    totals: dict[str, dict[int, float]] = {}
    for unit in find_units(model):
        if unit.name in found:
            block, number = expert_of(unit)
            totals.setdefault(block, {})[number] = found[unit.name][SHARE]
    assert totals and all(sum(shares.values()) == pytest.approx(2) for shares in totals.values())


def test_the_highest_shares_are_taken():
    model = tiny_model("olmoe", vocab_size=300)
    rows = Dataset.from_dict({"prompt": [pair[0] for pair in PAIRS], "completion": [pair[1] for pair in PAIRS]})
    report = with_expert_use(scan(model, progress=False), model, tiny_tokenizer(), rows, CONFIG)
    experts = [row for row in report.units if ".experts." in row.name]
    assert all(set(row.scores) == ({SHARE, GATE} if row in experts else set()) for row in report.units)
    for rank in (SHARE, GATE):
        best = sorted(experts, key=lambda row: (-row.scores[rank], row.name))[:6]
        only = KappaReport(experts, report.base, report.dtype)
        assert [unit.name for unit in select(only, k=6, order="highest", rank_by=rank).units] == [
            row.name for row in best
        ]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (lambda: tiny_model("llama"), "rank the experts of a mixture, and LlamaForCausalLM has none. Rank by kappa"),
        (lambda: deaf(tiny_model("olmoe", vocab_size=300)), "doesn't say which experts it chooses"),
    ],
)
def test_what_cant_be_ranked_so(model, expected):
    with pytest.raises(KappaTuneError, match=expected):
        expert_use(model(), tiny_tokenizer(), PAIRS, CONFIG)


def deaf(model: nn.Module) -> nn.Module:
    """A router that says more than scores, and no choice."""
    gate = model.model.layers[0].mlp.gate
    gate.register_forward_hook(lambda module, inputs, output: (output[0], output[0]))
    return model


def test_a_scan_can_not_measure_it():
    with pytest.raises(KappaTuneError, match="a scan can't measure it.*kappatune sft"):
        scan(tiny_model("olmoe", vocab_size=300), progress=False, rank_by=SHARE)


BLOCK = {"k": 6, "rank_by": SHARE, "order": "highest", "gain": {"examples": 4, "max_length": 16}}


def test_a_run_and_kappa_within_what_it_chose(saved_olmoe, tmp_path):
    """ESFT's experts, and the best conditioned matrices within them."""
    result = training.train(tmp_path, saved_olmoe, kappatune=BLOCK, max_steps=1, forgetting=None)
    out = tmp_path / "out"
    report = KappaReport.load(out / "kappa_report.json")
    assert all(".experts." in row.name for row in report.units) and len(report.units) == 48
    best = sorted(report.units, key=lambda row: (-row.scores[SHARE], row.name))[:6]
    assert [unit.name for unit in result.selection.units] == [row.name for row in best]
    words = ["select", out / "kappa_report.json", "--within", out / "selection.json", "--k", 2]
    assert kappatune(*words, "--output", tmp_path / "within.json")[0] == 0
    chosen = json.loads((tmp_path / "within.json").read_text())["units"]
    assert [unit["name"] for unit in chosen] == [row.name for row in sorted(best, key=lambda row: row.kappa)[:2]]
    other = json.loads((out / "selection.json").read_text())
    other["units"][0]["name"] = "model.layers.9.mlp.experts.0.up_proj.weight"
    (out / "selection.json").write_text(json.dumps(other))
    code, _, errors = kappatune(*words, "--output", tmp_path / "none.json")
    assert code == 2 and "1 of the 6 matrices to select within are not in the report" in " ".join(errors.split())


def test_a_comparison_ranks_experts_beside_other_methods(saved_olmoe, tmp_path):
    path = training.write_recipe(tmp_path / "recipe.yaml", training.tiny_recipe(tmp_path, saved_olmoe))
    bench = Bench.load(path, ["--kappatune.gain", "{examples: 4}"], validation=0.25, ranks=[SHARE])
    units = find_units(bench.base)
    (esft,) = parse_methods(f"highest:rank_by={SHARE}:k=6")
    shares = {row.name: row.scores[SHARE] for row in bench.pool.report.units if row.scores}
    chosen = [unit.name for unit in choose(esft, bench.pool, units, seed=0).units]
    assert chosen == sorted(shares, key=lambda name: (-shares[name], name))[:6]
    assert len(shares) == 48 < len(bench.pool.report.units)
    assert len(choose(parse_methods("lowest:k=58")[0], bench.pool, units, seed=0).units) == 58
