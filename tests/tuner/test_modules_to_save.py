"""Modules trained whole beside the selected matrices: heads of tasks, and what a user names."""

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import nn

from helpers.loops import TOKENS, logits, train
from helpers.tiny import CONFIGS, tiny_model
from kappatune_plugin import KappaTuneConfig, KappaTuneError, scan, select
from kappatune_plugin.tuner.what_to_train import TRAINED_WHOLE

TASKS = {
    "SEQ_CLS": ("ForSequenceClassification", {"labels": torch.arange(len(TOKENS)) % 3}),
    "TOKEN_CLS": ("ForTokenClassification", {"labels": TOKENS % 3}),
    "QUESTION_ANS": (
        "ForQuestionAnswering",
        {"start_positions": torch.ones(len(TOKENS), dtype=int), "end_positions": torch.full((len(TOKENS),), 2)},
    ),
}
ENCODER = {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 64}
NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0, "qa_dropout": 0.0}


def task_model(family: str, ending: str) -> nn.Module:
    torch.manual_seed(0)
    if family == "DistilBert":
        config = transformers.DistilBertConfig(**ENCODER, **NO_DROPOUT, num_labels=3)
    else:
        config = transformers.LlamaConfig(**CONFIGS["llama"][1], num_labels=3)
    config.num_labels = 2 if ending == "ForQuestionAnswering" else 3
    return getattr(transformers, family + ending)(config)


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS)[0]


@pytest.mark.parametrize("family", ["DistilBert", "Llama"])
@pytest.mark.parametrize("task", TASKS)
def test_every_task_trains_its_head_and_loads_again(task, family, tmp_path):
    ending, labels = TASKS[task]
    model = get_peft_model(task_model(family, ending), KappaTuneConfig(k="100%", exclude=["norm"], task_type=task))
    before = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
    heads = [name for name in before if ".modules_to_save.default.weight" in name]
    assert heads and len(before) > len(heads)
    train(model, 1, input_ids=TOKENS, **labels)
    assert not any(
        torch.equal(model.get_parameter(name), value) for name, value in before.items() if "norm" not in name
    )
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(task_model(family, ending), tmp_path)
    assert torch.equal(outputs(loaded), outputs(model))
    assert torch.equal(outputs(loaded.merge_and_unload()), outputs(model))


@pytest.mark.parametrize(("given", "inside"), [("lm_head", ["lm_head"]), ("self_attn", [".self_attn."])])
def test_what_is_trained_whole_is_not_ranked_too(given, inside, tmp_path):
    model = tiny_model("llama")
    everything = scan(model, exclude=["norm"], progress=False)
    everything.save(tmp_path / "report.json")
    twice = [row.name for row in everything.units if any(each in row.name for each in inside)]
    assert twice
    for settings in ({"exclude": ["norm"]}, {"report": str(tmp_path / "report.json")}):
        config = KappaTuneConfig(k="100%", modules_to_save=[given], **settings)
        peft_model = get_peft_model(tiny_model("llama"), config)
        ranked = {layer.unit.name for layer in peft_model.base_model.layers()}
        assert ranked == {row.name for row in everything.units} - set(twice)
        left_out = peft_model.base_model.reports["default"].left_out
        assert all(left_out[name] == TRAINED_WHOLE for name in twice)
        losses = train(peft_model, 3)
        assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize(
    "first", [{"modules_to_save": ["self_attn", "lm_head"]}, {"trainable_token_indices": {"embed_tokens": [60, 61]}}]
)
def test_a_second_adapter_knows_the_base_in_its_wrappers(first):
    model, alone = tiny_model("llama"), get_peft_model(tiny_model("llama"), KappaTuneConfig(k="100%"))
    model = get_peft_model(model, KappaTuneConfig(k=3, **first))
    train(model, 1)
    model.add_adapter("second", KappaTuneConfig(k="100%"))
    model.set_adapter("second")
    assert model.base_model.selections["second"].to_dict() == alone.base_model.selections["default"].to_dict()
    assert train(model, 2) == train(alone, 2)


def test_a_weight_that_is_tied_to_one_trained_whole_is_left_out():
    model = get_peft_model(
        tiny_model("llama", tie_word_embeddings=True),
        KappaTuneConfig(k="100%", exclude=["norm"], modules_to_save=["lm_head"]),
    )
    assert "model.embed_tokens.weight" not in {layer.unit.name for layer in model.base_model.layers()}


def test_a_selection_of_what_is_trained_whole_is_refused():
    selection = select(scan(tiny_model("llama"), progress=False), k="100%")
    with pytest.raises(KappaTuneError, match="modules_to_save trains whole"):
        get_peft_model(tiny_model("llama"), KappaTuneConfig(selection=selection, modules_to_save=["q_proj"]))


def test_new_tokens_can_be_trained_beside_the_units():
    model = tiny_model("llama")
    before = model.model.embed_tokens.weight.detach().clone()
    peft_model = get_peft_model(model, KappaTuneConfig(k=3, trainable_token_indices={"embed_tokens": [60, 61]}))
    tokens = torch.tensor([[3, 60, 5, 61]])
    train(peft_model, input_ids=tokens, labels=tokens)
    expected = logits(peft_model)
    merged = peft_model.merge_and_unload()
    after = merged.model.embed_tokens.weight
    assert set((after != before).any(1).nonzero().flatten().tolist()) == {60, 61}
    assert torch.equal(logits(merged), expected)


@pytest.mark.parametrize("head", [None, "2"])
def test_frozen_batch_norms_keep_the_statistics_of_the_base(head, tmp_path):
    """An adapter holds none: it would load into another model than the one that was trained."""
    rows = 3 + 2 * torch.randn(16, 8, generator=torch.Generator().manual_seed(0))

    def base() -> nn.Module:
        torch.manual_seed(0)
        layers = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.BatchNorm1d(8), nn.Linear(8, 4), nn.BatchNorm1d(4, affine=False)
        return nn.Sequential(*layers)

    names = ("running_mean", "running_var", "num_batches_tracked")
    model = get_peft_model(base(), KappaTuneConfig(k=2, modules_to_save=[head] if head else None))
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    for _ in range(3):
        model.train()(rows).square().mean().backward()
        optimizer.step()
    tuned = model.eval()(rows)
    for place in (1, 2, 4):
        norm, as_it_was = model.base_model.model[place], base()[place]
        moved = str(place) == head
        assert all(torch.equal(getattr(norm, name), getattr(as_it_was, name)) != moved for name in names)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(base(), tmp_path).eval()(rows), tuned)
    assert torch.equal(model.merge_and_unload().eval()(rows), tuned)
