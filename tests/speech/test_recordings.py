"""Reading recordings: files and columns, rates, and everything that may be wrong with one."""

import re

import numpy as np
import pytest
import soundfile
from datasets import Audio, Dataset

from helpers.speech import RATE, tone, wav, write_recordings
from kappatune_plugin import KappaTuneError
from kappatune_plugin.speech.recordings import read, speech_rows
from kappatune_plugin.speech.settings import AudioBlock

BLOCK = AudioBlock(prompt="<|AUDIO|>")


@pytest.mark.parametrize("place", ["base", "folder", "absolute"])
def test_files_are_found_and_read(tmp_path, place):
    rows = write_recordings(tmp_path / "sounds")
    block, base = BLOCK, tmp_path / "sounds"
    if place == "folder":
        block, base = AudioBlock(prompt="<|AUDIO|>", folder="sounds"), tmp_path
    if place == "absolute":
        rows, base = [{**row, "audio": str(base / row["audio"])} for row in rows], None
    found = speech_rows(Dataset.from_list(rows), block, "data.train", base)
    assert found["transcript"][:3] == [" yes", " no", " good"]
    for number, row in enumerate(found):
        samples = read(row["recording"], RATE)
        assert samples.dtype == np.float32 and abs(len(samples) / RATE - (0.4 + 0.05 * number)) < 0.01


def test_columns_of_datasets_are_read_without_their_decoder():
    rows = Dataset.from_dict({"audio": [wav(tone("yes"))], "text": ["yes"]}).cast_column("audio", Audio())
    (row,) = speech_rows(rows, BLOCK, "data.train")
    assert np.abs(read(row["recording"], RATE) - tone("yes")).max() < 1e-4
    samples = {"array": tone("yes").tolist(), "sampling_rate": RATE}
    assert np.array_equal(read(samples, RATE), tone("yes"))


def test_resampled_is_as_if_recorded_at_that_rate():
    heard = read(wav(tone("good", 0.5, 2 * RATE), 2 * RATE), RATE)
    expected = tone("good", 0.5)
    assert len(heard) == len(expected) and np.abs(heard - expected)[200:-200].max() < 0.01


def test_two_channels_are_averaged():
    stereo = np.stack([tone("yes"), np.zeros_like(tone("yes"))], axis=1)
    assert np.abs(read(wav(stereo), RATE) - tone("yes") / 2).max() < 1e-4


def problem(tmp_path, rows, **settings):
    with pytest.raises(KappaTuneError) as found:
        speech_rows(Dataset.from_list(rows), AudioBlock(prompt="<|AUDIO|>", **settings), "data.train", tmp_path)
    return str(found.value)


def test_what_is_wrong_with_a_row_is_said_with_its_number(tmp_path):
    (good, other) = write_recordings(tmp_path, 2)
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), RATE)
    (tmp_path / "nothing.wav").write_bytes(b"")
    (tmp_path / "text.wav").write_text("no sound at all, only words")
    for name, words in (
        ("empty.wav", "row 1: its recording '.*empty.wav' is empty"),
        ("nothing.wav", "row 1: its recording '.*nothing.wav' is empty"),
        ("text.wav", "row 1: its recording '.*text.wav' can't be read"),
        ("missing.wav", "row 1: there is no file '.*missing.wav'. Check the name, and audio.folder"),
        (None, "row 1: None is no recording"),
    ):
        found = problem(tmp_path, [good, {**other, "audio": name}])
        assert re.search(words, found), found
    assert "row 1: its transcript ' ...' has no words" in problem(tmp_path, [good, {**other, "text": " ..."}])
    assert "row 1: its transcript None has no words" in problem(tmp_path, [good, {**other, "text": None}])
    assert "row 0: its recording is 0.4 s long" in problem(tmp_path, [good], max_seconds=0.1)
    assert "audio.column: data.train has no column 'sound'" in problem(tmp_path, [good], column="sound")
    assert "audio.transcript: data.train has no column 'txt'" in problem(tmp_path, [good], transcript="txt")
    assert "there is no folder 'nowhere'" in problem(tmp_path, [good], folder="nowhere")
