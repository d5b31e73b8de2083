"""Whatever optimizer steps, however the model is held: the base gets what was trained."""

import copy

import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from helpers.loops import TOKENS, logits, train, trainable
from helpers.tiny import tiny_model
from kappatune_plugin import KappaTuneConfig


class ThroughData(torch.optim.Optimizer):
    """Leaves the version of a tensor as it was, as bitsandbytes' do."""

    def __init__(self, parameters: list[Tensor], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    def step(self, closure: object = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(parameter.grad.sign(), alpha=-group["lr"])


OPTIMIZERS = {
    "AdamW": lambda held: torch.optim.AdamW(held, lr=1e-2),
    "foreach": lambda held: torch.optim.AdamW(held, lr=1e-2, foreach=True),
    "fused": lambda held: torch.optim.AdamW(held, lr=1e-2, fused=True),
    "through .data": lambda held: ThroughData(held, lr=1e-2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_plain_loop_trains_what_the_optimizer_holds(name):
    model = get_peft_model(tiny_model("olmoe"), KappaTuneConfig(k=6))
    losses = train(model, 4, OPTIMIZERS[name](trainable(model)))
    assert losses == sorted(losses, reverse=True) and losses[0] - losses[-1] > 1e-3
    assert all(torch.equal(layer.block, layer.active.weight) for layer in model.base_model.layers())


def test_an_optimizer_that_evaluates_in_its_step_sees_its_own_values():
    def run(model: nn.Module, held: list[Tensor]) -> list[float]:
        optimizer, losses = torch.optim.LBFGS(held, lr=0.1, max_iter=3), []

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = model(input_ids=TOKENS, labels=TOKENS).loss
            loss.backward()
            losses.append(loss.item())
            return loss

        optimizer.step(closure)
        return losses

    model, reference = get_peft_model(tiny_model("llama"), KappaTuneConfig(k=4)), tiny_model("llama")
    # in the order of the masters: the sums of L-BFGS depend on it
    held = [reference.get_parameter(layer.unit.parameter) for layer in model.base_model.layers()]
    assert run(model, trainable(model)) == pytest.approx(run(reference, held), abs=1e-6)


class Holder(nn.Module):
    """A user's module around a language model."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> object:
        return self.inner(input_ids=input_ids, labels=labels)


@pytest.mark.parametrize(
    "make",
    [
        lambda base: get_peft_model(base, KappaTuneConfig(k=4)),
        lambda base: Holder(get_peft_model(base, KappaTuneConfig(k=4))),
        lambda base: inject_adapter_in_model(KappaTuneConfig(k=4), base),
    ],
    ids=["PeftModel", "a user's module around it", "injected"],
)
def test_a_trainer_moves_the_base(make, tmp_path):
    base = tiny_model("llama")
    before = copy.deepcopy(base.state_dict())
    args = TrainingArguments(
        str(tmp_path), report_to=[], use_cpu=True, max_steps=3, learning_rate=1e-2, logging_steps=1, save_strategy="no"
    )
    rows = [{"input_ids": TOKENS[0], "labels": TOKENS[0]}] * 8
    trainer = Trainer(model=make(base), args=args, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[-1]
    changed = [name for name, value in base.named_parameters() if name in before and not value.equal(before[name])]
    assert len(changed) == 4


def test_a_copy_made_after_training_trains_on():
    model = get_peft_model(tiny_model("olmoe"), KappaTuneConfig(k=6))
    train(model, 2)
    twin = copy.deepcopy(model)
    expected = train(model, 2)
    assert train(twin, 2) == expected
    assert torch.equal(logits(twin), logits(model))


def test_an_averaged_copy_is_the_mean_of_what_was_trained():
    """EMA and SWA change the copy's values in place, and no optimizer holds those."""
    model = get_peft_model(tiny_model("llama"), KappaTuneConfig(k=4))
    averaged = torch.optim.swa_utils.AveragedModel(model)
    optimizer, seen = torch.optim.AdamW(trainable(model), lr=1e-2), []
    for _ in range(3):
        train(model, 1, optimizer)
        averaged.update_parameters(model)
        seen.append({layer.unit.name: layer.active.weight.detach().clone() for layer in model.base_model.layers()})
    expected = tiny_model("llama")
    for name in seen[0]:
        expected.get_parameter(name).data = sum(each[name] for each in seen) / 3
    torch.testing.assert_close(logits(averaged), logits(expected), rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(averaged.module.merge_and_unload()), logits(expected), rtol=0, atol=1e-6)
