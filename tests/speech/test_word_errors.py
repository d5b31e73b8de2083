"""Word errors against cases counted by hand, and against a slow edit distance."""

import random

import pytest

from kappatune_plugin import KappaTuneError
from kappatune_plugin.speech.word_errors import WordErrors, normalizer, word_errors


def test_errors_are_counted_over_all_recordings():
    said, heard = ["the cat sat down", "no", "yes"], ["the bat sat", "", "yes yes"]
    # cat -> bat; down and no deleted; a yes inserted. Characters: c -> b; " down" and "no" deleted; " yes" inserted
    found = word_errors(said, heard, normalizer("none"))
    assert found == WordErrors(4 / 6, 12 / 21, 1, 2, 1, 6)


def test_more_may_be_heard_than_was_said():
    assert word_errors(["yes"], ["yes yes yes"], normalizer("none")).wer == 2.0


def distance(one, other):
    rows = list(range(len(other) + 1))
    for number, left in enumerate(one, 1):
        above, rows[0] = rows[0], number
        for place, right in enumerate(other, 1):
            above, rows[place] = rows[place], min(rows[place] + 1, rows[place - 1] + 1, above + (left != right))
    return rows[-1]


def test_random_sentences_against_an_edit_distance():
    draw = random.Random(0)
    said, heard = ([" ".join(draw.choices("abcd", k=draw.randint(1, 9))) for _ in range(40)] for _ in range(2))
    found = word_errors(said, heard, normalizer("none"))
    words = sum(len(each.split()) for each in said)
    errors = sum(distance(one.split(), other.split()) for one, other in zip(said, heard, strict=True))
    characters = sum(distance(one, other) for one, other in zip(said, heard, strict=True))
    assert found.words == words and found.wer == errors / words
    assert found.substitutions + found.deletions + found.insertions == errors
    assert found.cer == characters / sum(map(len, said))


@pytest.mark.parametrize(
    ("name", "said", "heard", "wer"),
    [
        ("english", "I'm here, Mister Bell!", "i am here mr bell", 0),
        ("english", "twenty five", "25", 0),
        ("basic", "Yes, no.", "yes no", 0),
        ("basic", "I'm", "i am", 0.5),
        ("none", "Yes", "yes", 1.0),
    ],
)
def test_what_normalizers_make_equal(name, said, heard, wer):
    assert word_errors([said], [heard], normalizer(name)).wer == wer


def test_what_normalizing_empties_is_said():
    with pytest.raises(KappaTuneError, match=r"transcript 'Hmm\.' has no words once it is normalized"):
        word_errors(["Hmm."], ["yes"], normalizer("english"))
