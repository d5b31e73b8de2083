"""Low-rank pairs on single units, slices of fused experts too, beside PEFT's LoRA and finite differences."""

import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from helpers.loops import logits, steps, train
from helpers.reference import random_batches
from helpers.tiny import tiny_model
from kappatune_plugin import KappaTuneConfig, KappaTuneError, lora_config, scan, select
from kappatune_plugin.interpolation.find_changes import changes_of_adapter
from kappatune_plugin.weights.units import find_units, unit_block

EXPERTS = ["*.experts.*"]
PAIRS = {"adapter": "lora", "r": 2, "lora_alpha": 6, "task_type": "CAUSAL_LM"}


def blocks(model: nn.Module) -> dict[str, torch.Tensor]:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    found = {each.name: unit_block(base.get_parameter(each.parameter), each) for each in find_units(base)}
    return {name: block.detach().clone() for name, block in found.items()}


def trained(model: nn.Module) -> int:
    return sum(value.numel() for value in model.parameters() if value.requires_grad)


def double(kind: str) -> nn.Module:
    model = tiny_model(kind, dtype=torch.float64)
    model.set_experts_implementation("eager")
    return model


@pytest.mark.parametrize("kind", ["llama", "gpt2", "olmoe", "mixtral", "qwen3_moe", "deepseek_v2", "gpt_oss"])
def test_only_the_selected_have_pairs_and_all_that_is_saved_computes_the_same(kind, tmp_path):
    include = EXPERTS if kind not in ("llama", "gpt2") else None
    selection = select(scan(tiny_model(kind), include=include or ()), k=3)
    tuned = get_peft_model(tiny_model(kind), KappaTuneConfig(selection=selection, **PAIRS))
    pairs = {name: value for name, value in tuned.named_parameters() if value.requires_grad}
    assert sorted(name.rpartition(".")[2] for name in pairs) == ["lora_A"] * 3 + ["lora_B"] * 3
    assert sum(value.numel() for value in pairs.values()) == sum(2 * sum(row.shape) for row in selection.units)
    before, at_first = blocks(tuned), logits(tuned)
    train(tuned, 4)
    chosen, now = {row.name for row in selection.units}, blocks(tuned)
    assert {name for name in now if not torch.equal(now[name], before[name])} == chosen
    found = logits(tuned)
    assert not torch.allclose(found, at_first, atol=1e-3)
    with tuned.disable_adapter():
        assert torch.equal(logits(tuned), at_first)
    tuned.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(kind), tmp_path)
    assert torch.equal(logits(loaded), found)
    assert torch.equal(logits(loaded.merge_and_unload(safe_merge=True)), found)


def linear(weight: torch.Tensor) -> nn.Linear:
    made = nn.Linear(*weight.shape[::-1], bias=False, dtype=weight.dtype)
    made.weight.data.copy_(weight)
    return made


class Apart(nn.Module):
    """The experts of a fused module as linear layers in lists."""

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        self.act_fn = fused.act_fn
        gate, up = fused.gate_up_proj.detach().chunk(2, dim=1)
        for name, weights in (("gate_proj", gate), ("up_proj", up), ("down_proj", fused.down_proj.detach())):
            setattr(self, name, nn.ModuleList(linear(each) for each in weights))

    def forward(self, hidden: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(hidden)
        for number, (gate, up, down) in enumerate(zip(self.gate_proj, self.up_proj, self.down_proj, strict=True)):
            tokens, place = torch.where(experts == number)
            found = down(self.act_fn(gate(hidden[tokens])) * up(hidden[tokens]))
            out = out.index_add(0, tokens, found * weights[tokens, place, None])
        return out


@pytest.mark.parametrize("rslora", [False, True])
def test_slices_train_as_pefts_lora_does_on_experts_that_are_modules(rslora):
    names = [f"model.layers.{layer}.mlp.experts.{which}" for layer, which in ((0, "1.gate_proj"), (1, "0.down_proj"))]
    pairs = {**PAIRS, "use_rslora": rslora}
    fused, apart = double("olmoe"), double("olmoe")
    for layer in apart.model.layers:
        layer.mlp.experts = Apart(layer.mlp.experts)
    selection = select(scan(fused, include=[f"{name}.weight" for name in names]), k=2)
    ours = get_peft_model(fused, KappaTuneConfig(selection=selection, **pairs), autocast_adapter_dtype=False)
    modules = [".".join((*name.split(".")[:-2], name.split(".")[-1], name.split(".")[-2])) for name in names]
    del pairs["adapter"]
    peft = get_peft_model(apart, LoraConfig(target_modules=modules, **pairs))
    layers = {layer.unit.name.removesuffix(".weight"): layer for layer in ours.base_model.layers()}
    for name, module in zip(names, modules, strict=True):
        theirs = peft.get_submodule(f"base_model.model.{module}.lora_A.default")
        theirs.weight.data.copy_(layers[name].active.lora_A)
    batches = random_batches(6)
    found, expected = (steps(model, batches) for model in (ours, peft))
    assert abs(expected[0] - expected[-1]) > 1e-3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(ours), logits(peft), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["olmoe", "gpt_oss"])
def test_gradients_are_those_of_finite_differences(kind):
    model = double(kind)
    selection = select(scan(model, include=["*layers.0.*.experts.*"]), k=2)
    tuned = get_peft_model(model, KappaTuneConfig(selection=selection, **PAIRS), autocast_adapter_dtype=False)
    experts = model.model.layers[0].mlp.experts
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(24, model.config.hidden_size, dtype=torch.float64, generator=generator)
    chosen = torch.arange(48).reshape(24, 2) % experts.num_experts
    for layer in tuned.base_model.layers():
        # at zero A has no gradient
        nn.init.normal_(layer.active.lora_B, std=0.02)
    tuned.base_model.write_through()

    def loss() -> torch.Tensor:
        return experts(hidden, chosen, torch.full((24, 2), 0.5, dtype=torch.float64)).square().sum()

    loss().backward()
    for leaf in [leaf for layer in tuned.base_model.layers() for leaf in layer.leaves]:
        place, sides = divmod(int(leaf.grad.abs().argmax()), leaf.shape[1]), []
        for shift in (1e-6, -2e-6):
            leaf.data[place] += shift
            tuned.base_model.write_through(everything=True)
            sides.append(loss().item())
        leaf.data[place] += 1e-6
        assert (sides[0] - sides[1]) / 2e-6 == pytest.approx(leaf.grad[place].item(), rel=1e-5)


def test_scaled_back_the_weight_is_on_the_line_to_its_base():
    model = tiny_model("mixtral")
    before = blocks(model)
    selection = select(scan(model, include=EXPERTS), k=2)
    tuned = get_peft_model(model, KappaTuneConfig(selection=selection, **PAIRS))
    train(tuned)
    after, changes = blocks(tuned), changes_of_adapter(tuned)
    changes.set(0.25)
    for row in selection.units:
        expected = before[row.name] + 0.25 * (after[row.name] - before[row.name])
        torch.testing.assert_close(blocks(tuned)[row.name], expected, rtol=0, atol=1e-7)
    changes.set(0.0)
    assert all(torch.equal(value, before[name]) for name, value in blocks(tuned).items())


def test_values_of_the_other_kind_are_refused(tmp_path):
    selection = select(scan(tiny_model("mixtral"), include=EXPERTS), k=2)
    whole = get_peft_model(tiny_model("mixtral"), KappaTuneConfig(selection=selection))
    pairs = get_peft_model(tiny_model("mixtral"), KappaTuneConfig(selection=selection, **PAIRS))
    whole.save_pretrained(tmp_path)
    with pytest.raises(KappaTuneError, match="trained with adapter: full, and this model's adapter is lora"):
        pairs.load_adapter(tmp_path, "default")


def test_pairs_are_of_the_base_that_they_were_trained_on(tmp_path):
    selection = select(scan(tiny_model("mixtral"), include=EXPERTS), k=2)
    tuned = get_peft_model(tiny_model("mixtral"), KappaTuneConfig(selection=selection, **PAIRS))
    tuned.save_pretrained(tmp_path)
    other = tiny_model("mixtral")
    other.model.layers[0].mlp.experts.down_proj.data *= 1.1
    other.model.layers[1].mlp.experts.down_proj.data *= 1.1
    with pytest.raises(KappaTuneError, match="fingerprint|another base"):
        PeftModel.from_pretrained(other, tmp_path)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "olmoe", "deepseek_v2"])
def test_match_has_as_many_values_as_lora_on_all_linear_layers(kind):
    wanted = trained(get_peft_model(tiny_model(kind), LoraConfig(r=1, target_modules="all-linear")))
    include = EXPERTS if kind in ("olmoe", "deepseek_v2") else None
    config = KappaTuneConfig(k=20 if include else 5, include=include, adapter="lora", match="lora_r1_all_linear")
    tuned = get_peft_model(tiny_model(kind), config)
    one = trained(tuned) / tuned.peft_config["default"].r
    assert abs(trained(tuned) - wanted) <= one / 2 and tuned.peft_config["default"].match is None
    assert tuned.peft_config["default"].lora_alpha == tuned.peft_config["default"].r and config.r is None
    wanted *= 3 if include else 9
    whole = get_peft_model(tiny_model(kind), KappaTuneConfig(include=include, match={"params": wanted}))
    largest = max(math.prod(unit.shape) for unit in find_units(tiny_model(kind)))
    assert wanted - largest < trained(whole) <= wanted
    plain = lora_config(tiny_model("llama"), KappaTuneConfig(k=5, adapter="lora", match={"params": "2k"}))
    assert plain.lora_alpha == plain.r >= 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 99}, "r is 99, expected 1 to 16: .*experts"),
        ({"lora_dropout": 0.1}, "lora_dropout is 0.1, and the pairs are added to the weights"),
        ({"adapter": "full"}, "r, lora_alpha: of low-rank pairs, and adapter is full: write `adapter: lora`"),
        ({"adapter": "lorra"}, "adapter: 'lorra' is none of full, lora. Did you mean 'lora'"),
        ({"match": "lora_r8_all_linear"}, "match and r both say how much is trained"),
        ({"r": None, "match": "lora_r8"}, "match: 'lora_r8' is no reference. Write lora_r16_all_linear"),
        ({"r": None, "match": {"params": "9b"}}, "expected 1 to"),
        ({"r": 0}, "r: 0 is not a number from 1 on"),
        ({"lora_alpha": -1.0}, "lora_alpha: -1.0 is not a number above 0"),
        ({"include": ["*.exprts.*"]}, "exprts"),
    ],
)
def test_what_it_refuses(settings, message):
    config = {"k": 2, "include": EXPERTS, **PAIRS, **settings}
    with pytest.raises(KappaTuneError, match=message):
        get_peft_model(tiny_model("mixtral"), KappaTuneConfig(**config))
