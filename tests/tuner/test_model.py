"""The PEFT method: what it trains, and what it leaves alone."""

import copy

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from helpers.loops import logits, mixed_selection, steps
from helpers.reference import random_batches, train_with_full_gradients
from helpers.tiny import CONFIGS, tiny_model
from helpers.training import unit_values
from kappatune_plugin import KappaTuneConfig, KappaTuneError, scan, select
from kappatune_plugin.tuner.layer import KappaTuneLayer
from kappatune_plugin.weights.units import find_units


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind != "bert"])
def test_only_the_selected_units_change(kind, dtype):
    """Over the whole state dict, with weight decay on."""
    model = tiny_model(kind, dtype)
    before = copy.deepcopy(model.state_dict())
    selection = mixed_selection(model)
    peft_model = get_peft_model(model, KappaTuneConfig(selection=selection.to_dict()))
    steps(peft_model, random_batches(3))
    merged = peft_model.merge_and_unload()
    assert type(merged) is type(tiny_model(kind)) and set(merged.state_dict()) == set(before)
    units = {unit.name: unit for unit in find_units(merged)}
    for row in selection.units:
        unit = units[row.name]
        after, base = merged.state_dict()[unit.parameter][unit.index], before[unit.parameter][unit.index]
        assert not torch.equal(after, base), row.name
        after.copy_(base)
    assert all(torch.equal(value, before[name]) for name, value in merged.state_dict().items())


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}])
@pytest.mark.parametrize("experts", ["eager", "batched_mm", "grouped_mm"])
def test_equals_full_gradients_on_the_slices(experts, checkpointing, accumulation):
    batches = random_batches(3, accumulation)
    model, reference = tiny_model("olmoe"), tiny_model("olmoe")
    if not hasattr(model, "set_experts_implementation") and experts != "eager":
        pytest.skip("transformers 4 knows eager experts only")
    for one in (model, reference) if hasattr(model, "set_experts_implementation") else ():
        one.set_experts_implementation(experts)
    selection = mixed_selection(model, k=15)
    names = [row.name for row in selection.units]
    expected = train_with_full_gradients(reference, names, batches, checkpointing=checkpointing)
    peft_model = get_peft_model(model, KappaTuneConfig(selection=selection.to_dict()))
    if checkpointing is not None:
        peft_model.gradient_checkpointing_enable(checkpointing)
        peft_model.enable_input_require_grads()
    losses = steps(peft_model, batches)
    assert losses == pytest.approx(expected, abs=1e-6)
    ours, theirs = unit_values(model), unit_values(reference)
    for name in names:
        # AdamW makes more of rounding; with batched_mm the reference adds up an outer product for each token
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=2e-5 if experts == "batched_mm" else 2e-6)


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind not in ("olmoe", "bert")])
def test_every_architecture_equals_full_gradients(kind):
    model, reference = tiny_model(kind), tiny_model(kind)
    selection = mixed_selection(model)
    names = [row.name for row in selection.units]
    expected = train_with_full_gradients(reference, names, random_batches(3))
    losses = steps(get_peft_model(model, KappaTuneConfig(selection=selection.to_dict())), random_batches(3))
    assert losses == pytest.approx(expected, abs=1e-6)


def test_bf16_base_with_fp32_masters_equals_the_same_reference():
    model, reference = (tiny_model("olmoe", torch.bfloat16) for _ in range(2))
    selection = mixed_selection(model)
    names = [row.name for row in selection.units]
    expected = train_with_full_gradients(reference, names, random_batches(4))
    assert steps(get_peft_model(model, KappaTuneConfig(selection=selection.to_dict())), random_batches(4)) == expected
    ours, theirs = unit_values(model), unit_values(reference)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_embedding_and_head_train_through_every_use(kind):
    """GPT-2 ties them: the gradient of both uses has to arrive."""
    model, reference = tiny_model(kind), tiny_model(kind)
    patterns = {"include": ["embedding", "head"], "exclude": ()}
    selection = mixed_selection(model, order="lowest", k=2, **patterns)
    names = [row.name for row in selection.units]
    expected = train_with_full_gradients(reference, names, random_batches(3))
    losses = steps(get_peft_model(model, KappaTuneConfig(selection=selection.to_dict())), random_batches(3))
    assert losses == pytest.approx(expected, abs=1e-6)


def test_optimizer_state_is_eight_bytes_a_selected_parameter():
    model = tiny_model("olmoe", torch.bfloat16)
    selection = mixed_selection(model)
    count = sum(rows * columns for rows, columns in (row.shape for row in selection.units))
    peft_model = get_peft_model(model, KappaTuneConfig(selection=selection.to_dict()))
    masters = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
    assert sum(master.numel() for master in masters) == count
    optimizer = torch.optim.AdamW(masters)
    tokens = random_batches(1)[0][0]
    peft_model.train()(input_ids=tokens, labels=tokens).loss.backward()
    gradients = [parameter.grad for parameter in peft_model.parameters() if parameter.grad is not None]
    # storage, not numel: a view into a fused gradient would keep all of it
    assert sum(gradient.untyped_storage().nbytes() for gradient in gradients) == 4 * count
    optimizer.step()
    moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    assert sum(moment.untyped_storage().nbytes() for moment in moments) == 8 * count


def test_print_trainable_parameters_counts_the_selected(capsys):
    model = tiny_model("olmoe")
    selection = mixed_selection(model)
    count = sum(rows * columns for rows, columns in (row.shape for row in selection.units))
    get_peft_model(model, KappaTuneConfig(selection=selection.to_dict())).print_trainable_parameters()
    assert f"trainable params: {count:,} " in capsys.readouterr().out


def test_the_default_selection_is_the_k_lowest():
    model = tiny_model("olmoe")
    expected = [row.name for row in select(scan(model, progress=False), k=5).units]
    peft_model = get_peft_model(model, KappaTuneConfig(k=5))
    assert [row.name for row in peft_model.base_model.selections["default"].units] == expected
    assert {layer.unit.name for layer in peft_model.base_model.layers()} == set(expected)


def test_disable_adapter_restores_the_base_exactly_in_mid_training():
    model = tiny_model("olmoe", torch.bfloat16)
    untouched = logits(tiny_model("olmoe", torch.bfloat16))
    peft_model = get_peft_model(model, KappaTuneConfig(k=9))
    steps(peft_model, random_batches(2))
    trained = logits(peft_model)
    assert not torch.equal(trained, untouched)
    with peft_model.disable_adapter():
        assert torch.equal(logits(peft_model), untouched)
    assert torch.equal(logits(peft_model), trained)


def test_training_is_the_same_with_the_base_measured_in_between():
    batches = random_batches(4)

    def run(measure: bool) -> list[float]:
        peft_model = get_peft_model(tiny_model("olmoe", torch.bfloat16), KappaTuneConfig(k=9))
        optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for batch in batches:
            losses += steps(peft_model, [batch], optimizer)
            if measure:
                with peft_model.disable_adapter():
                    logits(peft_model)
        return losses

    assert run(measure=True) == run(measure=False)


def test_the_base_may_run_between_forward_and_backward():
    """As DPO does; a backward while the base holds other values would be wrong and is refused."""
    tokens = random_batches(1)[0][0]
    peft_model = get_peft_model(tiny_model("olmoe"), KappaTuneConfig(k=7))
    steps(peft_model, random_batches(1))
    masters = [layer.active.weight for layer in peft_model.base_model.layers()]
    peft_model.zero_grad()
    peft_model(input_ids=tokens, labels=tokens).loss.backward()
    expected = [master.grad.clone() for master in masters]
    peft_model.zero_grad()
    loss = peft_model(input_ids=tokens, labels=tokens).loss
    with peft_model.disable_adapter():
        peft_model(input_ids=tokens)
        with pytest.raises(KappaTuneError, match="outside of disable_adapter"):
            loss.backward(retain_graph=True)
    peft_model.zero_grad()
    loss = peft_model(input_ids=tokens, labels=tokens).loss
    with peft_model.disable_adapter():
        peft_model(input_ids=tokens)
    loss.backward()
    assert all(torch.equal(master.grad, each) for master, each in zip(masters, expected, strict=True))


def test_named_adapters_take_turns():
    model = tiny_model("olmoe")
    base = logits(model)
    peft_model = get_peft_model(model, KappaTuneConfig(k=5), adapter_name="low")
    steps(peft_model, random_batches(2))
    low = logits(peft_model)
    peft_model.add_adapter("high", KappaTuneConfig(k=5, order="highest"))
    assert torch.equal(logits(peft_model), low)
    reports = peft_model.base_model.reports
    assert [row.kappa for row in reports["high"].units] == [row.kappa for row in reports["low"].units]
    peft_model.set_adapter("high")
    assert torch.equal(logits(peft_model), base)
    steps(peft_model, random_batches(2))
    high = logits(peft_model)
    assert not torch.equal(high, base) and not torch.equal(high, low)
    peft_model.set_adapter("low")
    assert torch.equal(logits(peft_model), low)
    peft_model.set_adapter("high")
    assert torch.equal(logits(peft_model), high)
    with pytest.raises(KappaTuneError, match="one adapter at a time"):
        peft_model.base_model.set_adapter(["low", "high"])
    peft_model.set_adapter("low")
    peft_model.delete_adapter("low")
    peft_model.set_adapter("high")
    assert torch.equal(logits(peft_model), high)
    peft_model.delete_adapter("high")
    assert torch.equal(logits(model), base)
    assert not [module for module in model.modules() if isinstance(module, KappaTuneLayer)]


def test_a_scan_that_fails_leaves_the_adapter_before_it_as_it_was():
    peft_model = get_peft_model(tiny_model("olmoe"), KappaTuneConfig(k=5), adapter_name="low")
    steps(peft_model, random_batches(2))
    low = logits(peft_model)
    with pytest.raises(KappaTuneError, match="no_such_weight"):
        peft_model.add_adapter("high", KappaTuneConfig(k=5, include=["no_such_weight"]))
    assert torch.equal(logits(peft_model), low)


def test_unload_gives_the_base_back():
    model = tiny_model("olmoe")
    before = copy.deepcopy(model.state_dict())
    peft_model = get_peft_model(model, KappaTuneConfig(k=9))
    steps(peft_model, random_batches(2))
    after = peft_model.unload().state_dict()
    assert set(after) == set(before) and all(torch.equal(after[name], before[name]) for name in before)


def test_safe_merge_refuses_what_is_not_finite():
    peft_model = get_peft_model(tiny_model("llama"), KappaTuneConfig(k=2))
    first, last = peft_model.base_model.layers()
    with torch.no_grad():
        last.active.weight[0, 0] = torch.nan
    for merge in (peft_model.merge_and_unload, peft_model.base_model.merge_adapter):
        with pytest.raises(KappaTuneError, match="finite"):
            merge(safe_merge=True)
        # the others go on training
        assert not first.merged and not last.merged


def test_a_copied_model_trains_on_its_own():
    peft_model = get_peft_model(tiny_model("olmoe"), KappaTuneConfig(k=5))
    copied = copy.deepcopy(peft_model)
    before = logits(peft_model)
    steps(copied, random_batches(2))
    assert torch.equal(logits(peft_model), before) and not torch.equal(logits(copied), before)


class StepsBehindTheBack:
    """An optimizer that is none of torch's."""

    def __init__(self, parameters: list[Tensor], through_data: bool) -> None:
        self.parameters, self.through_data = parameters, through_data

    @torch.no_grad()
    def step(self) -> None:
        for parameter in self.parameters:
            (parameter.data if self.through_data else parameter).sub_(0.1 * parameter.grad)

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


def test_a_step_that_never_reached_the_base_is_an_error():
    peft_model = get_peft_model(tiny_model("olmoe"), KappaTuneConfig(k=5))
    optimizer = StepsBehindTheBack([p for p in peft_model.parameters() if p.requires_grad], through_data=False)
    with pytest.raises(KappaTuneError, match="write_through"):
        steps(peft_model, random_batches(2), optimizer)
    peft_model.base_model.write_through()
    steps(peft_model, random_batches(1), optimizer)


def test_values_that_never_reached_the_base_are_not_saved(tmp_path):
    peft_model = get_peft_model(tiny_model("olmoe"), KappaTuneConfig(k=5))
    optimizer = StepsBehindTheBack([p for p in peft_model.parameters() if p.requires_grad], through_data=True)
    steps(peft_model, random_batches(2), optimizer)
    with pytest.raises(KappaTuneError, match="write_through"):
        peft_model.save_pretrained(tmp_path)
    peft_model.base_model.write_through(everything=True)
    peft_model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("fill", [torch.nan, 0.0])
def test_nan_and_zero_weights_are_never_trained(fill):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.gate_proj.weight.fill_(fill)
    peft_model = get_peft_model(model, KappaTuneConfig(k=13))
    names = {layer.unit.name for layer in peft_model.base_model.layers()}
    assert len(names) == 13 and "model.layers.0.mlp.gate_proj.weight" not in names
