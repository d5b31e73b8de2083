"""The paper's third experiment, small: a text model learns to hear digits, trained where kappa is lowest, or elsewhere.

SmolLM2-135M-Instruct gets ears in two stages. Before them, a small encoder learns by CTC to hear digits, for it has to
exist; it is frozen afterwards. Stage 1 trains the projector between encoder and text model, stage 2 the projector and
the share K of the text model's matrices with the lowest kappa, the highest, or a random choice. Word errors are counted
on recordings of other takes, and beside them the loss on text of Wikipedia says what the text model forgot.

Needs the recordings of FSDD, wikitext-2 and the text model. Killed and started again it goes on where it was.

    python benchmarks/speech.py --text_model FOLDER [--data DATA] [--results docs/results/speech.jsonl]
    python benchmarks/results.py
"""

import argparse
import copy
import io
import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from datasets import Dataset
from peft import get_peft_model
from records import Records
from speech_results import BATCH, CTC_STEPS, LOOKS, ORDERS, RATES, STEPS, K
from study import REPOSITORY
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    TrainerCallback,
    WhisperFeatureExtractor,
)
from trl import SFTConfig, SFTTrainer

from kappatune_plugin import KappaTuneConfig, scan
from kappatune_plugin.forgetting.measures import blocks, measuring, token_loss
from kappatune_plugin.speech.collator import SpeechCollator
from kappatune_plugin.speech.compose import compose
from kappatune_plugin.speech.word_errors import SpeechTask, normalizer

WORDS = "zero one two three four five six seven eight nine".split()
RATE, SECONDS, TAKES_KEPT, STRINGS, TEST = 8000, 2, 5, 1500, 48
EARS = {
    "num_mel_bins": 40,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 512,
    "d_model": 128,
    "max_source_positions": 25,
}
PROMPT, PROJECTOR = "<|im_start|><|AUDIO|> Digits:", "multi_modal_projector"
SEEDS = 3
CTC_BATCH, CTC_RATE = 32, 2e-3
TEXTS, TOKENS = 16, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text_model", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared" / "data")
    parser.add_argument("--results", type=Path, default=REPOSITORY / "docs" / "results" / "speech.jsonl")
    parser.add_argument("--work", type=Path, default=REPOSITORY / "outputs" / "speech")
    args = parser.parse_args()
    records = Records(args.results)
    bench = Bench(args.text_model, args.data, args.work)
    for seed, order in [(0, None), *itertools.product(range(SEEDS), ORDERS)]:
        run = {"seed": seed, "order": order}
        if not records.has(run):
            records.add(run, [bench.run(seed, order)])


def strings(folder: Path, test: bool, count: int, seed: int) -> Dataset:
    """Two digits said by one speaker, one after the other: {"recording": wav as datasets.Audio has it, "transcript"}.

    Args:
        test: of the takes that training never sees.
    """
    random_, found = random.Random(seed), {}
    for path in sorted(folder.glob("*.wav")):
        digit, speaker, take = path.stem.split("_")
        if (int(take) < TAKES_KEPT) == test:
            found.setdefault(speaker, []).append((WORDS[int(digit)], soundfile.read(path, dtype="float32")[0]))
    rows = []
    while len(rows) < count:
        said = random_.choices(found[random_.choice(sorted(found))], k=2)
        samples = np.concatenate([said[0][1], np.zeros(RATE // 20, dtype=np.float32), said[1][1]])
        if len(samples) < SECONDS * RATE:
            file = io.BytesIO()
            soundfile.write(file, samples, RATE, format="WAV")
            transcript = " " + " ".join(word for word, _ in said)
            rows.append({"recording": {"bytes": file.getvalue(), "path": None}, "transcript": transcript})
    return Dataset.from_list(rows)


def ears(tokenizer: Any) -> tuple[nn.Module, Any]:
    """A speech model, untrained, whose encoder is the one to train, and its processor."""
    extractor = WhisperFeatureExtractor(
        feature_size=EARS["num_mel_bins"], sampling_rate=RATE, hop_length=320, chunk_length=SECONDS, n_fft=512
    )
    text = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
    torch.manual_seed(0)
    model = Qwen2AudioForConditionalGeneration(Qwen2AudioConfig(audio_config=EARS, text_config=text))
    return model, Qwen2AudioProcessor(extractor, tokenizer)


def learn_to_hear(encoder: nn.Module, extractor: Any, rows: Dataset) -> float:
    """Train `encoder` by CTC over digits; returns the mean loss of the last 50 steps."""
    sounds = [soundfile.read(io.BytesIO(row["recording"]["bytes"]), dtype="float32")[0] for row in rows]
    made = extractor(sounds, RATE, padding="max_length", return_attention_mask=True, return_tensors="pt")
    _, lengths = encoder._get_feat_extract_output_lengths(made["attention_mask"].sum(-1))
    targets = torch.tensor([[1 + WORDS.index(word) for word in row["transcript"].split()] for row in rows])
    head = nn.Linear(EARS["d_model"], 1 + len(WORDS))
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW([each for each in parameters if each.requires_grad], CTC_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, CTC_RATE, total_steps=CTC_STEPS)
    losses = []
    for _ in range(CTC_STEPS):
        batch = torch.randint(len(rows), (CTC_BATCH,))
        heard = head(encoder(made["input_features"][batch]).last_hidden_state).log_softmax(-1).transpose(0, 1)
        sizes = torch.full((CTC_BATCH,), targets.shape[1])
        loss = nn.functional.ctc_loss(heard, targets[batch], lengths[batch], sizes, zero_infinity=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return sum(losses[-50:]) / 50


class Bench:
    """The text model with ears, what it is trained on and what is measured."""

    def __init__(self, text_model: Path, data: Path, work: Path) -> None:
        recordings = data / "speech" / "fsdd" / "recordings"
        self.work, self.train = work, strings(recordings, False, STRINGS, 0)
        tokenizer = AutoTokenizer.from_pretrained(text_model)
        text = AutoModelForCausalLM.from_pretrained(text_model, dtype=torch.float32)
        speech, processor = ears(tokenizer)
        work.mkdir(parents=True, exist_ok=True)
        self._encoder(speech.model.audio_tower, processor.feature_extractor)
        self.model, self.processor = compose(speech, processor, text, tokenizer)
        self.model.requires_grad_(False)
        self.collator = SpeechCollator.build(self.processor, PROMPT, RATE)
        test = strings(recordings, True, TEST, 1)
        self.task = SpeechTask(self.collator, test, normalizer("basic"), batch_size=32, max_new_tokens=5)
        wikipedia = (data / "text" / "wikitext-2" / "valid.txt").read_text(encoding="utf-8")
        paragraphs = [each.strip() for each in wikipedia.splitlines() if len(each) > 400][:TEXTS]
        self.texts, self.report = blocks(tokenizer, paragraphs, TOKENS, True), None

    def _encoder(self, encoder: nn.Module, extractor: Any) -> None:
        file = self.work / "encoder.pt"
        if not file.exists():
            print("CTC loss", learn_to_hear(encoder, extractor, self.train), flush=True)
            torch.save(encoder.state_dict(), file)
        encoder.load_state_dict(torch.load(file))

    def measured(self, model: nn.Module, step: int) -> dict[str, float]:
        """Word errors on the test recordings, and the loss on text in nats a token."""
        with measuring(model):
            errors = vars(self.task.measure(model))
            text_loss = token_loss(model, self.texts, 8, "text").nats_per_token
        found = {"step": step, **errors, "text_loss": text_loss}
        print(found, self.task.written[:4], flush=True)
        return found

    def run(self, seed: int, order: str | None) -> dict[str, Any]:
        """Stage 1 for `order` None, else stage 2: `seed` deals the rows and draws the random matrices."""
        projector = self.work / "projector.pt"
        torch.manual_seed(seed)
        model = copy.deepcopy(self.model)
        ears_to_words = getattr(model.model, PROJECTOR)
        if order is None:
            ears_to_words.requires_grad_(True)
            record = self._train(model, seed, 0)
            torch.save(ears_to_words.state_dict(), projector)
            return record
        ears_to_words.load_state_dict(torch.load(projector))
        self.report = self.report or scan(model, progress=False)
        settings = {"k": K, "order": order, "seed": seed, "report": self.report, "modules_to_save": [PROJECTOR]}
        model = get_peft_model(model, KappaTuneConfig(task_type="CAUSAL_LM", **settings))
        found = self._train(model, seed, 1)
        units = model.base_model.selections["default"].units
        return {**found, "matrices": len(units), "parameters": sum(each.shape[0] * each.shape[1] for each in units)}

    def _train(self, model: nn.Module, seed: int, stage: int) -> dict[str, Any]:
        args = SFTConfig(
            output_dir=str(self.work / "run"),
            max_steps=STEPS[stage],
            per_device_train_batch_size=BATCH,
            learning_rate=RATES[stage],
            lr_scheduler_type="cosine",
            warmup_steps=5,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            remove_unused_columns=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            seed=seed,
        )
        look = Look(self, STEPS[:1] if stage == 0 else LOOKS)
        trainer = SFTTrainer(
            model=model,
            args=args,
            data_collator=self.collator,
            train_dataset=self.train,
            processing_class=self.processor,
            callbacks=[look],
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return {"curve": look.curve, "train_losses": losses}


class Look(TrainerCallback):
    """Measures at some steps."""

    def __init__(self, bench: Bench, steps: tuple[int, ...]) -> None:
        self.bench, self.steps, self.curve = bench, steps, []

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        """Measure if it is one of the steps."""
        if state.global_step in self.steps:
            self.curve.append(self.bench.measured(model, state.global_step))


if __name__ == "__main__":
    main()
