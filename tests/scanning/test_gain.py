"""gain_over_forgetting against full gradients, one text and one token at a time."""

import pytest
import torch

from helpers.tiny import tiny_model, tiny_tokenizer
from kappatune_plugin import KappaTuneError
from kappatune_plugin.forgetting.measures import sample_base
from kappatune_plugin.scanning.gain import (
    DAMPING,
    GainConfig,
    fisher_information,
    gain_over_forgetting,
    ratios,
    task_gain,
    to_example,
)
from kappatune_plugin.weights.units import find_units, unit_block

ROWS = [("the cat", " sat on the mat<eos>"), ("yes", " no<eos>"), ("a good bad", " cat<eos>"), ("", "no mat yes<eos>")]
KINDS = ["llama", "olmoe", "deepseek_v3", "gpt_oss"]


def slow_gradients(model, ids: list[int], positions: list[int]) -> dict[str, torch.Tensor]:
    """Gradient of the summed loss of the tokens at `positions`, for each unit, by autograd on whole parameters."""
    model.eval().requires_grad_(True).zero_grad()
    logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    (-sum(logits[position - 1, ids[position]] for position in positions)).backward()
    found = {}
    for unit in find_units(model):
        gradient = model.get_parameter(unit.parameter).grad
        found[unit.name] = unit_block(torch.zeros_like(model.get_parameter(unit.parameter)), unit)
        if gradient is not None:
            found[unit.name] = unit_block(gradient, unit).clone()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_gain_is_the_squared_gradient_of_each_batch(kind):
    model, tokenizer = tiny_model(kind, vocab_size=300), tiny_tokenizer()
    examples = [to_example(tokenizer, *row, max_length=64) for row in ROWS]
    batches = [examples[:3], examples[3:]]
    expected: dict[str, float] = {}
    for batch in batches:
        tokens = sum(len(ids) - start for ids, start in batch)
        gradients = [slow_gradients(model, ids, list(range(start, len(ids)))) for ids, start in batch]
        for name in gradients[0]:
            mean = sum(each[name] for each in gradients) / tokens
            expected[name] = expected.get(name, 0.0) + mean.square().sum().item() / len(batches)
    units = find_units(model)
    found = task_gain(model, units, examples, batch_size=3)
    assert found.keys() == expected.keys() and max(expected.values()) > 0
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-3, abs=1e-9), name


@pytest.mark.parametrize("kind", KINDS)
def test_information_is_the_squared_gradient_of_each_text(kind):
    model = tiny_model(kind, vocab_size=300)
    written = [[5, 9, 33, 40], [7, 8], [11, 12, 13, 14, 15]]
    expected = {}
    for ids in written:
        for name, gradient in slow_gradients(model, ids, list(range(1, len(ids)))).items():
            expected[name] = expected.get(name, 0.0) + gradient.square().sum().item() / 8
    found = fisher_information(model, find_units(model), written, batch_size=1)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-3, abs=1e-9), name


def test_information_does_not_depend_on_the_batch_on_the_models_own_text():
    """Exactly the Fisher information in expectation: by enumeration of all texts of two tokens after the first."""
    model = tiny_model("llama", vocab_size=8)
    units = find_units(model)[:3]
    with torch.no_grad():
        first = model(input_ids=torch.tensor([[1]])).logits[0, -1].double().softmax(-1)
        then = model(input_ids=torch.tensor([[1, a] for a in range(8)])).logits[:, -1].double().softmax(-1)
    by_token = dict.fromkeys([unit.name for unit in units], 0.0)
    by_text = dict(by_token)
    for a in range(8):
        one = slow_gradients(model, [1, a], [1])
        for b in range(8):
            two = slow_gradients(model, [1, a, b], [2])
            probability = (first[a] * then[a, b]).item()
            for name in by_token:
                by_token[name] += probability * (one[name].square().sum() + two[name].square().sum()).item()
                by_text[name] += probability * (one[name] + two[name]).square().sum().item()
    for name in by_token:
        assert by_text[name] == pytest.approx(by_token[name], rel=1e-3)


def test_the_ratio_is_damped_for_what_no_token_reached():
    units = find_units(tiny_model("llama"))[:3]
    a, b, c = (unit.name for unit in units)
    entries = {unit.name: unit.shape[0] * unit.shape[1] for unit in units}
    found = ratios(units, {a: 2.0, b: 1.0, c: 0.0}, {a: 4.0, b: 0.0, c: 0.0})
    damping = DAMPING * 4.0 / sum(entries.values())
    assert found[a] == pytest.approx(2.0 / (4.0 + damping * entries[a]))
    assert found[b] == pytest.approx(1.0 / (damping * entries[b])) and found[c] == 0.0


def test_whole_deterministic_and_without_trace():
    model, tokenizer = tiny_model("olmoe", vocab_size=300).train(), tiny_tokenizer()
    model.model.embed_tokens.weight.requires_grad_(False)
    model.config.output_router_logits = True
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    config = GainConfig(examples=3, samples=3, max_length=16, batch_size=2)
    torch.manual_seed(5)
    expected_random = torch.rand(2)
    torch.manual_seed(5)
    found = gain_over_forgetting(model, tokenizer, ROWS, config)
    assert torch.equal(torch.rand(2), expected_random)
    assert model.training and model.config.output_router_logits
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    wanted = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert wanted == {"model.embed_tokens.weight"}
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
    gradients = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert gradients == ["lm_head.weight"] and (model.lm_head.weight.grad == 1).all()
    assert found.keys() == {unit.name for unit in find_units(model)} and all(value >= 0 for value in found.values())
    assert found == gain_over_forgetting(model, tokenizer, ROWS, config)
    assert found != gain_over_forgetting(model, tokenizer, ROWS, config.model_copy(update={"seed": 1}))
    # by its parts
    units = find_units(model)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(0))[:3]
    gain = task_gain(model, units, [to_example(tokenizer, *ROWS[index], max_length=16) for index in order], 2)
    written = sample_base(model, tokenizer, 3, 16, 0, 2)
    assert found == ratios(units, gain, fisher_information(model, units, written, 2))


def test_examples_keep_their_answer():
    tokenizer = tiny_tokenizer()
    ids, start = to_example(tokenizer, "the cat sat on the mat", " yes", max_length=4)
    assert len(ids) == 4 and tokenizer.decode(ids[start:]) == " yes"
    assert to_example(tokenizer, "", "the cat", max_length=64) == (tokenizer("the cat").input_ids, 1)


def test_what_cannot_be_measured():
    from peft import get_peft_model

    from kappatune_plugin import KappaTuneConfig

    model, tokenizer = tiny_model("olmoe", vocab_size=300), tiny_tokenizer()
    with pytest.raises(KappaTuneError, match="needs training rows"):
        gain_over_forgetting(model, tokenizer, [])
    with pytest.raises(KappaTuneError, match="fewer than two tokens"):
        gain_over_forgetting(model, tokenizer, [("", "y")])
    with pytest.raises(KappaTuneError, match="examples: 0.*\n.*batch_size: True"):
        GainConfig(examples=0, batch_size=True)
    broken = tiny_model("olmoe", vocab_size=300)
    with torch.no_grad():
        broken.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(KappaTuneError, match="gradients of .* aren't finite, such as that of"):
        gain_over_forgetting(broken, tokenizer, ROWS)
    with pytest.raises(KappaTuneError, match="before an adapter"):
        gain_over_forgetting(get_peft_model(model, KappaTuneConfig(k=3)), tokenizer, ROWS)
