"""Probes against the slow and obvious: one text at a time, one token at a time."""

import math

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from tokenizers.processors import TemplateProcessing

from helpers.tiny import tiny_model, tiny_tokenizer
from kappatune_plugin import KappaTuneConfig, KappaTuneError
from kappatune_plugin.data.examples import ChoiceExample
from kappatune_plugin.forgetting.logits import logits_from, padded
from kappatune_plugin.forgetting.measures import (
    base_of,
    blocks,
    completion_ids,
    completion_kl,
    completion_loss,
    exact_recall,
    kl_to_base,
    label_accuracy,
    label_scores,
    measuring,
    sample_base,
    token_loss,
)

PIECES = [[5, 9, 33, 40], [7, 8], [11, 12, 13, 14, 15, 16, 17]]


def tuned_model(dtype: torch.dtype = torch.float32):
    """An OLMoE whose trained weights differ from its base's."""
    model = get_peft_model(tiny_model("olmoe", dtype, vocab_size=300), KappaTuneConfig(k=9))
    with torch.no_grad():
        for layer in model.base_model.layers():
            layer.active.weight.add_(torch.randn_like(layer.active.weight) * 0.3)
    model.base_model.write_through()
    return model


def slow_losses(model, piece: list[int]) -> list[float]:
    """Loss of each token but the first, from one forward for each."""
    model.eval()
    losses = []
    for position in range(1, len(piece)):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([piece[:position]])).logits[0, -1].float()
        losses.append(-torch.log_softmax(logits, -1)[piece[position]].item())
    return losses


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_token_loss_weighs_every_token_alike(batch_size):
    model = tiny_model("olmoe")
    losses = [loss for piece in PIECES for loss in slow_losses(model, piece)]
    found = token_loss(model, PIECES, batch_size)
    assert found.tokens == len(losses) == 10
    assert found.nats_per_token == pytest.approx(sum(losses) / 10, abs=1e-6)
    assert found.perplexity == pytest.approx(math.exp(sum(losses) / 10), rel=1e-5)


def test_token_loss_is_what_the_metamathqa_benchmark_measures():
    """Its definition step by step: texts cut at max_length, padded on the left, each token's logits for the next."""
    model, tokenizer = tuned_model().eval(), tiny_tokenizer()
    texts = ["the cat sat on the mat, yes and no", "yes", "no good bad mat " * 6]
    batch = tokenizer(texts, truncation=True, max_length=12, padding=True, padding_side="left", return_tensors="pt")
    losses = []
    with torch.no_grad(), model.disable_adapter():
        for logits, ids, mask in zip(model(**batch).logits, batch.input_ids, batch.attention_mask, strict=True):
            kept, target = logits[-mask.sum() :], ids[-mask.sum() :]
            losses.append(torch.nn.functional.cross_entropy(kept[:-1], target[1:], reduction="none"))
    expected = torch.cat(losses)
    pieces = blocks(tokenizer, texts, max_length=12, truncate=True)
    with base_of(model):
        found = token_loss(model, pieces, batch_size=2)
    assert found.tokens == len(expected) > 20
    assert found.nats_per_token == pytest.approx(expected.mean().item(), rel=1e-6)


def test_virtual_tokens_before_the_text_are_not_counted():
    base = tiny_model("olmoe", vocab_size=300)
    model = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    prompt = model.get_prompt(1).detach()
    losses, divergences = [], []
    for piece in PIECES:
        text = base.get_input_embeddings()(torch.tensor([piece]))
        with torch.no_grad():
            tuned = base(inputs_embeds=torch.cat([prompt, text], 1)).logits[0, 3:].float().log_softmax(-1)
            plain = base(inputs_embeds=text).logits[0].float().log_softmax(-1)
        for position in range(len(piece) - 1):
            losses.append(-tuned[position, piece[position + 1]].item())
            divergences.append((plain[position].exp() * (plain[position] - tuned[position])).sum().item())
    found = token_loss(model, PIECES)
    assert found.tokens == 10 and found.nats_per_token == pytest.approx(sum(losses) / 10, rel=1e-4)
    assert kl_to_base(model, PIECES) == pytest.approx(sum(divergences) / 10, rel=1e-3)


def test_base_is_measured_without_the_adapter():
    model = tuned_model()
    untouched = token_loss(tiny_model("olmoe", vocab_size=300), PIECES)
    assert token_loss(model, PIECES) != untouched
    with model.disable_adapter():
        assert token_loss(model, PIECES) == untouched


@pytest.mark.parametrize("batch_size", [1, 8])
def test_kl_is_forward_and_from_the_base(batch_size):
    model, base = tuned_model().eval(), tiny_model("olmoe", vocab_size=300).eval()
    total = 0.0
    for piece in PIECES:
        with torch.no_grad():
            p, q = (one(input_ids=torch.tensor([piece])).logits[0, :-1].double().softmax(-1) for one in (base, model))
        total += (p * (p.log() - q.log())).sum().item()
    assert total > 0.01
    assert kl_to_base(model, PIECES, batch_size) == pytest.approx(total / 10, rel=1e-4)


def test_kl_of_the_base_to_itself_is_zero():
    assert kl_to_base(tiny_model("olmoe"), PIECES) == 0


def test_kl_on_the_task_counts_the_completion_only():
    model, base, tokenizer = tuned_model().eval(), tiny_model("olmoe", vocab_size=300).eval(), tiny_tokenizer()
    pairs = [("the cat", " sat on the mat"), ("yes", " no"), ("a good bad cat", " yes")]
    total, tokens = 0.0, 0
    for prompt, completion in pairs:
        ids = tokenizer(prompt + completion, return_tensors="pt").input_ids
        count = len(tokenizer(completion).input_ids)
        with torch.no_grad():
            p, q = (one(input_ids=ids).logits[0, -count - 1 : -1].double().softmax(-1) for one in (base, model))
        total += (p * (p / q).log()).sum().item()
        tokens += count
    for batch_size in (1, 2, 8):
        assert completion_kl(model, tokenizer, pairs, batch_size) == pytest.approx(total / tokens, rel=1e-4)
    with pytest.raises(KappaTuneError, match="no test examples"):
        completion_kl(model, tokenizer, [])


def test_measuring_restores_modes_and_random_state():
    model = tuned_model().train()
    model.base_model.model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    with measuring(model):
        torch.rand(10)
        assert not any(module.training for module in model.modules()) and not torch.is_grad_enabled()
    assert torch.equal(torch.rand(3), expected)
    assert [module.training for module in model.modules()] == modes


def test_completions_start_where_trl_starts_them():
    tokenizer = tiny_tokenizer()
    prompt, completion = completion_ids(tokenizer, "the cat sat", " on the mat")
    assert tokenizer.decode(prompt + completion) == "the cat sat on the mat"
    assert prompt + completion == tokenizer("the cat sat on the mat").input_ids
    # "ma" is one token or two, "mat" another: the end of the prompt merges with the completion
    merged_prompt, merged = completion_ids(tokenizer, "the cat sat on the ma", "t")
    assert tokenizer.decode(merged_prompt) == "the cat sat on the" and tokenizer.decode(merged) == " mat"


def test_label_accuracy_by_brute_force():
    model, tokenizer = tuned_model(), tiny_tokenizer()
    # labels of one token and of several, whose likelihoods add up
    choices = (" yes", " no", " the cat")
    prompts = [f"the cat {number} sat" for number in range(12)]
    best, losses = [], []
    for prompt in prompts:
        scores = []
        for choice in choices:
            ids, count = tokenizer(prompt + choice).input_ids, len(tokenizer(choice).input_ids)
            scores.append(-sum(slow_losses(model, ids)[-count:]))
        best.append(scores.index(max(scores)))
        losses.append((-max(scores), len(tokenizer(choices[best[-1]]).input_ids)))
    examples = [ChoiceExample(prompt, choices, answer) for prompt, answer in zip(prompts, best, strict=True)]
    nats, tokens = map(sum, zip(*losses, strict=True))
    assert label_scores(model, tokenizer, examples) == (1.0, pytest.approx(nats / tokens))
    wrong = [ChoiceExample(e.prompt, e.choices, (e.answer + 1) % 3) for e in examples[:3]]
    assert label_accuracy(model, tokenizer, wrong + examples[3:], batch_size=2) == 9 / 12


def test_answers_of_one_token_to_one_prompt_are_read_once():
    model, tokenizer = tuned_model(), tiny_tokenizer()
    read = []
    model.get_base_model().lm_head.register_forward_hook(lambda *_: read.append(_[1][0].shape[:2]))
    label_scores(model, tokenizer, [ChoiceExample(f"the cat {n} sat", (" mat", " no"), 0) for n in range(4)])
    # a row for each prompt, and of each row the last position
    assert read == [(4, 1)]


def test_logits_from_a_position_on_are_those_of_the_whole():
    model = tuned_model().eval()
    ids, mask = padded(PIECES, model.device)
    whole = model(input_ids=ids, attention_mask=mask.long()).logits
    base = model.get_base_model()
    asked = base.forward
    # as models that compute all of them
    for forward in (asked, lambda input_ids, attention_mask, use_cache: asked(input_ids, attention_mask)):
        base.forward = forward
        torch.testing.assert_close(logits_from(model, ids, mask, 3), whole[:, 3:], rtol=0, atol=1e-6)


def test_a_frozen_head_is_not_copied_for_each_row():
    """As torch's bmm does, several times as slow as the product, where the hidden states aren't contiguous."""
    model = tuned_model().eval()
    seen = []
    model.get_base_model().lm_head.register_forward_pre_hook(lambda _, given: seen.append(given[0].is_contiguous()))
    logits_from(model, *padded(PIECES, model.device), 3)
    assert seen == [True]


def test_completion_loss_is_a_mean_over_completion_tokens():
    model, tokenizer = tuned_model(), tiny_tokenizer()
    pairs = [("the cat", " sat on the mat"), ("yes", " no")]
    losses = []
    for prompt, completion in pairs:
        count = len(tokenizer(completion).input_ids)
        losses += slow_losses(model, tokenizer(prompt + completion).input_ids)[-count:]
    assert completion_loss(model, tokenizer, pairs) == pytest.approx(sum(losses) / len(losses), abs=1e-5)


def test_exact_recall_is_what_greedy_decoding_gives():
    model, tokenizer = tiny_model("llama", vocab_size=300).train(), tiny_tokenizer()
    pairs = [("the cat", " sat on the mat"), ("a good", " cat"), ("a bad", " mat"), ("yes", " no no")]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        for prompt, completion in pairs[:3]:
            ids = tokenizer(prompt + completion, return_tensors="pt").input_ids
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    pairs += [("the cat", " sat on the cat"), ("the cat", " sat")]
    right = 0
    for prompt, completion in pairs:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        count = len(tokenizer(completion).input_ids)
        with torch.no_grad():
            written = model.eval().generate(input_ids=ids, max_new_tokens=count, do_sample=False, eos_token_id=None)
        right += tokenizer.decode(written[0, ids.shape[1] :]) == completion
    assert right == 4
    assert exact_recall(model, tokenizer, pairs, batch_size=4) == right / len(pairs)


def test_blocks_cut_long_texts_and_drop_what_predicts_nothing():
    tokenizer = tiny_tokenizer()
    text = "the cat sat on the mat"
    ids = tokenizer(text).input_ids
    assert blocks(tokenizer, [text, "", "y"], max_length=4) == [
        piece for piece in (ids[:4], ids[4:8], ids[8:]) if len(piece) >= 2
    ]
    assert blocks(tokenizer, [text, "yes no"], max_length=4, truncate=True) == [
        ids[:4],
        tokenizer("yes no").input_ids,
    ]
    with pytest.raises(KappaTuneError, match="2 control texts"):
        blocks(tokenizer, ["", "y"], max_length=4)


def test_self_control_is_the_base_models_own_text():
    tokenizer, model = tiny_tokenizer(), tuned_model()
    torch.manual_seed(3)
    expected_random = torch.rand(2)
    torch.manual_seed(3)
    pieces = sample_base(model, tokenizer, samples=10, max_length=12, seed=5, batch_size=4)
    assert torch.equal(torch.rand(2), expected_random)
    assert len(pieces) == 10 and all(3 <= len(piece) <= 12 for piece in pieces)
    assert all(piece[0] == tokenizer.bos_token_id for piece in pieces)
    assert pieces == sample_base(model, tokenizer, samples=10, max_length=12, seed=5, batch_size=4)
    assert pieces == sample_base(tiny_model("olmoe", vocab_size=300), tokenizer, 10, 12, 5, 4)
    assert pieces != sample_base(model, tokenizer, samples=10, max_length=12, seed=6, batch_size=4)
    # sampled from the base, so the base predicts it best
    with model.disable_adapter():
        base = token_loss(model, pieces).nats_per_token
    assert token_loss(model, pieces).nats_per_token > base


def test_nothing_to_measure_is_an_error():
    model, tokenizer = tiny_model("olmoe", vocab_size=300), tiny_tokenizer()
    for measure in (label_accuracy, completion_loss, exact_recall):
        with pytest.raises(KappaTuneError, match="no "):
            measure(model, tokenizer, [])
    with pytest.raises(KappaTuneError, match="two at least"):
        label_accuracy(model, tokenizer, [ChoiceExample("the cat", (" yes",), 0)])
    with pytest.raises(KappaTuneError, match="adds no token"):
        exact_recall(model, tokenizer, [("the cat", "")])


def test_bfloat16_models_are_measured():
    found = token_loss(tuned_model(torch.bfloat16), PIECES).nats_per_token
    assert found == pytest.approx(token_loss(tuned_model(), PIECES).nats_per_token, abs=0.1)


def test_every_piece_begins_with_the_start_token_that_the_tokenizer_adds():
    """Gemma's does, and a model that leans on it is measured out of its element without it."""
    tokenizer, text = tiny_tokenizer(), "the cat sat on the mat, yes. " * 4
    plain = tokenizer(text).input_ids
    start = tokenizer.bos_token_id
    adding = TemplateProcessing(single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, start)])
    tokenizer.backend_tokenizer.post_processor = adding
    pieces = blocks(tokenizer, [text], max_length=12)
    assert all(piece[0] == start and len(piece) <= 12 for piece in pieces) and len(pieces) > 3
    assert [token for piece in pieces for token in piece[1:]] == plain
    assert blocks(tokenizer, [text], max_length=12, truncate=True) == pieces[:1]


def test_a_model_of_nan_knows_nothing():
    """Nothing is greater than NaN, so the first label would win: 50% of two."""
    model, tokenizer = tiny_model("llama", vocab_size=300), tiny_tokenizer()
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    examples = [ChoiceExample("the cat", (" yes", " no"), answer) for answer in (0, 1)]
    assert all(map(math.isnan, label_scores(model, tokenizer, examples)))
    assert math.isnan(exact_recall(model, tokenizer, [("the cat", " yes")]))
