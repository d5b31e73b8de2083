"""torch.compile: one graph, as LoRA has, and the gradients of a run without it."""

import pytest
import torch
import torch._dynamo
from peft import get_peft_model
from torch._dynamo.testing import CompileCounterWithBackend

from helpers.tiny import tiny_model
from kappatune_plugin import KappaTuneConfig

IDS = torch.arange(16)[None]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def counted(model):
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(model, backend=counter), counter


def gradients(model, run):
    model.zero_grad()
    loss = run(input_ids=IDS, labels=IDS).loss
    if loss.requires_grad:
        loss.backward()
    return loss.item(), {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


@pytest.mark.parametrize(("kind", "settings"), [("llama", {}), ("olmoe", {}), ("olmoe", {"adapter": "lora"})])
def test_one_graph_and_the_same_gradients(kind, settings):
    model = get_peft_model(tiny_model(kind), KappaTuneConfig(task_type="CAUSAL_LM", k="40%", **settings))
    loss, wanted = gradients(model, model)
    base = loss
    compiled, counter = counted(model)
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.5)
    for _ in range(2):
        found, got = gradients(model, compiled)
        assert found == pytest.approx(loss, abs=1e-6) and got.keys() == wanted.keys()
        for name, each in wanted.items():
            torch.testing.assert_close(got[name], each, rtol=1e-5, atol=1e-7)
        # what the step moved is what the graph reads, and what the model reads without it
        optimizer.step()
        before = loss
        loss, wanted = gradients(model, model)
        assert abs(loss - before) > 1e-3
    assert counter.frame_count == 1
    with model.disable_adapter():
        found, got = gradients(model, compiled)
    assert found == pytest.approx(base, abs=1e-6) and not got
