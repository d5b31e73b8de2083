"""Stage 1 of speech, `k: 0` beside `modules_to_save`, on two ranks against one process with the same batches."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForMultimodalLM

from helpers.rank_jobs import HAS_DEEPSPEED, train
from helpers.ranks import run_ranks
from helpers.speech import WORDS, save_speech, tone, wav

PROJECTOR = "multi_modal_projector"
ROWS = [{"recording": wav(tone(WORDS[n % 4], 0.3 + n / 50)), "transcript": f" {WORDS[n % 4]}"} for n in range(32)]
needs_deepspeed = pytest.mark.skipif(not HAS_DEEPSPEED, reason="deepspeed isn't installed")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return save_speech(tmp_path_factory.mktemp("qwen2_audio"))


@pytest.mark.distributed
@pytest.mark.parametrize(
    "mode", ["ddp", "fsdp2", *[pytest.param(f"zero{stage}", marks=needs_deepspeed) for stage in (2, 3)]]
)
def test_the_projector_alone(mode, saved, tmp_path):
    """It gets the weights that one process gives it, saves them, and resumes to the bit; nothing else moves."""
    given = {"model": str(saved), "config": {"k": 0, "modules_to_save": [PROJECTOR]}, "recordings": ROWS}
    expected = train(mode="one", output=str(tmp_path / "one"), per_device_train_batch_size=4, **given)
    whole = tmp_path / "whole"
    found = run_ranks(train, mode=mode, output=str(whole), save_strategy="steps", save_steps=2, **given)[0]
    assert min(expected["norms"]) > 0.05 and expected["losses"][-1] < expected["losses"][0]
    assert found["losses"] == pytest.approx(expected["losses"], abs=1e-5)
    for name, value in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], value, rtol=0, atol=1e-5)

    before = AutoModelForMultimodalLM.from_pretrained(saved, dtype=torch.float32)
    was = {name: value.clone() for name, value in before.named_parameters()}
    loaded = dict(PeftModel.from_pretrained(before, whole).merge_and_unload().named_parameters())
    assert {name for name in was if not torch.equal(loaded[name], was[name])} == {n for n in was if PROJECTOR in n}
    trained = {name.replace(".modules_to_save.default", ""): each for name, each in found["weights"].items()}
    assert all(torch.equal(value, trained[name]) for name, value in loaded.items())

    resume = str(whole / "checkpoint-2")
    resumed = run_ranks(train, mode=mode, output=str(tmp_path / "resumed"), resume=resume, **given)[0]
    assert resumed["losses"] == found["losses"]
    assert all(torch.equal(resumed["weights"][name], value) for name, value in found["weights"].items())
