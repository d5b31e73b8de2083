import pytest
import torch

from helpers.tiny import tiny_model, tiny_tokenizer
from kappatune_plugin import KappaTuneError
from kappatune_plugin.forgetting.answers import answer_accuracy, final_answer, write_answers


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so $4^2 = \\boxed{16}$.The answer is: 16", 16.0),
        ("She makes <<9*2=18>>18 a day.\n#### 18", 18.0),
        ("The answer is: 50%.", 50.0),
        ("The answer is: $3.50!", 3.5),
        ("The answer is 20/35", 20 / 35),
        ("The answer is: 7\nQuestion: another one", 7.0),
        ("#### 1\n#### 2", 2.0),
        # the first mark of the list that is there counts, wherever it stands
        ("The answer is: 1 and then #### 2", "1 and then #### 2"),
        ("#### 1,000", "1,000"),
        ("The final answer is: x + 1", "x + 1"),
        ("The answer is: 1/0", "1/0"),
        ("The answer is: 1/2/3", "1/2/3"),
        ("it is 16", None),
        ("", None),
    ],
)
def test_final_answers(text, answer):
    assert final_answer(text) == answer


@pytest.fixture(scope="module")
def learned():
    """A model that answers two questions by heart, one of them wrongly; prompts of different length."""
    model, tokenizer = tiny_model("llama", vocab_size=300).train(), tiny_tokenizer()
    texts = [("the cat", " sat\n#### 5"), ("yes and no", " The answer is: 7."), ("a good cat", " bad #### 2")]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        for prompt, answer in texts:
            ids = torch.tensor([[*tokenizer(prompt + answer).input_ids, tokenizer.eos_token_id]])
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, tokenizer, texts


def test_what_is_written_does_not_depend_on_the_batch(learned):
    model, tokenizer, texts = learned
    prompts, answers = zip(*texts, strict=True)
    assert write_answers(model, tokenizer, prompts, max_new_tokens=40) == list(answers)
    assert [write_answers(model, tokenizer, [prompt], 40)[0] for prompt in prompts] == list(answers)
    assert model.training


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_accuracy_counts_final_answers(learned, batch_size):
    model, tokenizer, texts = learned
    pairs = [(texts[0][0], "#### 5.0"), (texts[1][0], "by other words\n#### 14/2"), (texts[2][0], "#### 3")]
    assert answer_accuracy(model, tokenizer, pairs, 40, batch_size=batch_size) == pytest.approx(2 / 3)
    written: list[dict] = []
    answer_accuracy(model, tokenizer, pairs, 40, batch_size=batch_size, written=written)
    assert [row["correct"] for row in written] == [True, True, False]
    assert [row["written"] for row in written] == [answer for _, answer in texts[:3]]
    # no room for the answer: prompt and answer together
    assert answer_accuracy(model, tokenizer, pairs, 40, max_length=4, batch_size=batch_size) == 0


def test_right_answers_without_a_final_answer_are_an_error(learned):
    model, tokenizer, _ = learned
    with pytest.raises(KappaTuneError, match="'no number' has no final answer.*'#### '"):
        answer_accuracy(model, tokenizer, [("the cat", "no number")])
    with pytest.raises(KappaTuneError, match="no test examples"):
        answer_accuracy(model, tokenizer, [])
