"""The dial on tiny models: exact at both ends, better a matrix, and its promise kept on text that it never saw."""

import copy

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, OFTConfig, PeftModel, VeraConfig, get_peft_model
from torch import nn

from helpers.learner import documents, learner, loss, train
from helpers.quantize import needs_bitsandbytes, quantize
from helpers.tiny import tiny_model
from kappatune_plugin import KappaTuneConfig, KappaTuneError
from kappatune_plugin.forgetting.measures import base_of
from kappatune_plugin.interpolation.change import Change, Changes
from kappatune_plugin.interpolation.dial import DialSettings, turn
from kappatune_plugin.interpolation.find_changes import changes_of_adapter, changes_of_checkpoint
from kappatune_plugin.interpolation.interpolate import turn_model
from kappatune_plugin.interpolation.texts import Texts

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
METHODS = {
    "kappatune": lambda: KappaTuneConfig(k=8),
    "with_module": lambda: KappaTuneConfig(k=4, modules_to_save=["lm_head"]),
    "lora": lambda: LoraConfig(r=4, target_modules=LINEAR, lora_alpha=8),
    "lora_tokens": lambda: LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[5, 9]),
    "vera": lambda: VeraConfig(r=4, target_modules=["q_proj", "o_proj"]),
}
IDS = torch.arange(3, 33).reshape(3, 10)


@pytest.fixture(scope="module")
def base() -> nn.Module:
    """Knows one language. Copy before training."""
    return learner()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def tuned(base: nn.Module, method: str, steps: int = 40, rate: float = 1e-2) -> PeftModel:
    return train(get_peft_model(copy.deepcopy(base), METHODS[method]()), documents(2, 100, 7), steps, rate).eval()


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("method", METHODS)
def test_both_ends_are_exact(base, method):
    model = tuned(base, method)
    trained, values, changes = logits(model), state(model), changes_of_adapter(model)
    assert not torch.equal(trained, logits(base))
    changes.set(0.5)
    assert not torch.equal(logits(model), trained)
    changes.set(0.0)
    assert torch.equal(logits(model), logits(base))
    changes.set(1.0)
    assert torch.equal(logits(model), trained)
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


@needs_bitsandbytes
@pytest.mark.parametrize("method", ["kappatune", "lora"])
def test_both_ends_are_exact_on_a_quantized_base(method):
    """Alpha 0 is the base as it was dequantized, and what stays quantized is never touched."""
    # bitsandbytes' blocks have 64 columns
    quantized = quantize(tiny_model("llama", hidden_size=64, intermediate_size=128), "nf4")
    model = train(get_peft_model(quantized, METHODS[method]()), documents(2, 100, 7), 10, 1e-2).eval()
    trained, changes = logits(model), changes_of_adapter(model)
    # its state_dict() packs quantized weights anew
    values = {name: value.clone() for name, value in model.named_parameters()}
    with model.disable_adapter():
        base = logits(model)
    assert not torch.equal(trained, base)
    changes.set(0.5)
    changes.set(0.0)
    assert torch.equal(logits(model), base)
    changes.set(1.0)
    assert torch.equal(logits(model), trained)
    assert all(torch.equal(value, values[name]) for name, value in model.named_parameters())


@pytest.mark.parametrize("kind", ["llama", "olmoe"])
def test_whole_checkpoints_are_exact_to_the_slice(kind):
    base = tiny_model(kind, torch.bfloat16)
    model = copy.deepcopy(base)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value) * 0.02)
    values, changes = state(model), changes_of_checkpoint(base, model)
    if kind == "olmoe":
        assert "model.layers.0.mlp.experts.3.up_proj.weight" in changes.names
    for alpha, expected in ((0.5, None), (0.0, base.state_dict()), (1.0, values)):
        changes.set(alpha)
        if expected is not None:
            assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    changes.set([0.0] * len(changes.names))
    changes.set([float(name.endswith("experts.3.up_proj.weight")) for name in changes.names])
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, base.state_dict()[name])}
    assert all("gate_up_proj" in name for name in moved) and len(moved) == (2 if kind == "olmoe" else 0)


@pytest.mark.parametrize("method", ["kappatune", "lora"])
def test_slopes_are_finite_differences(base, method):
    model = tuned(base, method)
    changes = changes_of_adapter(model)
    alphas = [0.3 + 0.05 * place for place in range(len(changes.names))]
    texts = documents(3, 4, 7)

    def at(moved: int, by: float) -> float:
        changes.set([alpha + by * (place == moved) for place, alpha in enumerate(alphas)])
        return loss(model, texts)

    wanted = [(at(place, 5e-3) - at(place, -5e-3)) / 1e-2 for place in range(len(alphas))]
    changes.set(alphas)
    ids = torch.tensor([pieces[0][0] for pieces in texts])
    with changes.taking_gradients():
        scores = model(input_ids=ids).logits[:, :-1]
        nn.functional.cross_entropy(scores.flatten(0, 1), ids[:, 1:].flatten()).backward()
        assert changes.slopes() == pytest.approx(wanted, abs=2e-4, rel=1e-2)
    assert all(value.grad is None for value in model.parameters())


def turned(model, changes, limit, per_matrix=True, rows=40, seed=0):
    settings = DialSettings(limit, per_matrix, quiet=True, seed=seed)
    return turn_model(model, changes, documents(4, rows, 7), {"known": documents(5, 80, 1)}, settings)


def test_per_matrix_keeps_the_limit_and_learns_more_on_text_it_never_saw(base):
    control, task, limit = documents(6, 400, 1), documents(7, 200, 7), 0.05
    found = {}
    for per_matrix in (False, True):
        model = tuned(base, "lora", steps=60)
        with base_of(model):
            before = loss(model, control)
        trained = loss(model, control) - before
        dialed = turned(model, changes_of_adapter(model), limit, per_matrix)
        assert trained > 4 * limit
        assert dialed.verified["known"].upper <= limit and loss(model, control) - before <= limit
        found[dialed.mode] = loss(model, task)
        assert set(dialed.alphas) == set(changes_of_adapter(tuned(base, "lora", 1)).names)
    assert found["per_matrix"] < found["one"] - 0.02


def test_what_forgets_nothing_is_kept_whole(base):
    model = tuned(base, "kappatune", steps=2, rate=1e-4)
    values = state(model)
    dialed = turned(model, changes_of_adapter(model), 0.5)
    assert dialed.mode == "trained" and set(dialed.alphas.values()) == {1.0}
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


def test_a_limit_that_nothing_keeps_leaves_what_was_trained():
    weight = torch.tensor([0.0])
    weight += 1.0
    changes = Changes({"weight": [Change(weight)]})
    # what is learned and what is forgotten both grow with the weight
    control, task = (Texts(lambda rows, sign=sign: sign * weight.expand(len(rows)), [1] * 40) for sign in (1.0, -1.0))
    with pytest.raises(KappaTuneError, match="No scale above 0 keeps the control loss within 1e-06 nats"):
        turn(changes, task, {"known": control}, DialSettings(1e-6, per_matrix=False, quiet=True))
    assert weight.item() == 1.0
    dialed = turn(changes, task, {"known": control}, DialSettings(0.5, per_matrix=False, quiet=True))
    assert weight.item() == pytest.approx(dialed.alphas["weight"]) and 0.5 - 1 / 64 <= weight.item() <= 0.5
    assert dialed.verified["known"].mean == pytest.approx(weight.item())
    assert {0.0, 0.25, 0.5, 0.75, 1.0} < {point["alpha"] for point in dialed.frontier}
    assert all(point["task_loss"] == pytest.approx(-point["alpha"]) for point in dialed.frontier)


def test_too_few_texts_are_an_error_or_said(base):
    model = tuned(base, "lora")
    changes, settings = changes_of_adapter(model), DialSettings(0.05, False, quiet=True)
    for rows, controls, found in (
        (9, {}, "no control"),
        (3, {"known": documents(5, 9, 1)}, "3 rows are held out"),
        (9, {"known": documents(5, 1, 1)}, "known has 1 documents"),
    ):
        with pytest.raises(KappaTuneError, match=found):
            turn_model(model, changes, documents(4, rows, 7), controls, settings)
    dialed = turn_model(model, changes, documents(4, 9, 7), {"known": documents(5, 12, 1)}, settings)
    assert not dialed.verified["known"].enough
    assert any("6 documents are too few to promise" in sentence for sentence in dialed.sentences())


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (OFTConfig(target_modules=["q_proj"], oft_block_size=8), "OFT changes"),
        (LoraConfig(target_modules=["q_proj"], use_dora=True), "DoRA"),
        (LoraConfig(target_modules=["q_proj"], bias="all"), "bias: all"),
        (LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa"), "pissa"),
    ],
)
def test_changes_that_cannot_be_scaled_are_refused(base, config, found):
    with pytest.raises(KappaTuneError, match=f"{found}.*Merge it"):
        changes_of_adapter(get_peft_model(copy.deepcopy(base), config))


def test_wrong_values_and_bases_are_refused(base):
    model = tuned(base, "lora")
    next(value for name, value in model.named_parameters() if "lora_B" in name).data[0, 0] = torch.nan
    with pytest.raises(KappaTuneError, match="of 14 trained weights hold NaN"):
        changes_of_adapter(model)
    with pytest.raises(KappaTuneError, match="not trained from this base"):
        changes_of_checkpoint(tiny_model("llama", hidden_size=16), base)
    with pytest.raises(KappaTuneError, match="nothing to scale back"):
        changes_of_checkpoint(base, copy.deepcopy(base))


def test_adalora_is_scaled_through_its_diagonal(base):
    model = get_peft_model(copy.deepcopy(base), AdaLoraConfig(target_modules=["q_proj"], total_step=10)).eval()
    for name, value in model.named_parameters():
        if "lora_E" in name:
            value.data += 1.0
    changes = changes_of_adapter(model)
    trained = logits(model)
    changes.set(0.0)
    assert torch.equal(logits(model), logits(base)) and not torch.equal(trained, logits(base))
