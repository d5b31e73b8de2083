"""How much a run forgets: what it measures, when, and what it leaves behind."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from kappatune_plugin.data.examples import ChoiceExample, choice_examples, pairs
from kappatune_plugin.data.rows import load_rows
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.forgetting.answers import answer_accuracy
from kappatune_plugin.forgetting.config import SELF, ForgettingConfig
from kappatune_plugin.forgetting.measures import (
    blocks,
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
from kappatune_plugin.forgetting.report import EXACT_MATCH, WER, ForgettingReport
from kappatune_plugin.speech.recordings import TRANSCRIPT
from kappatune_plugin.speech.word_errors import SpeechTask

Remember = Callable[[str, Callable[[], dict[str, float]]], dict[str, float]]
Task = list[ChoiceExample] | list[tuple[str, str]] | list[tuple[list, list]]


def measured_now(what: str, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Measures, and remembers nothing."""
    return measure()


@dataclass
class ForgettingData:
    """What is measured, as text.

    Attributes:
        controls: name -> texts; None where the base model writes them.
        task: test examples with labels, or (prompt, completion) pairs without, which are texts or lists of messages;
            empty for no task.
        facts: (prompt, completion) pairs to recall, or questions of another task with their possible answers.
        speech: test recordings, in the place of `task`.
    """

    controls: dict[str, list[str] | None] = field(default_factory=dict)
    task: Task = field(default_factory=list)
    facts: list[tuple[str, str]] | list[ChoiceExample] = field(default_factory=list)
    speech: SpeechTask | None = None

    @classmethod
    def load(
        cls,
        config: ForgettingConfig,
        task: Task | None = None,
        folder: Path | None = None,
        speech: SpeechTask | None = None,
    ) -> "ForgettingData":
        """Load what `config` names; relative paths may start in `folder`.

        Raises:
            KappaTuneError: data that can't be loaded, a column that isn't there, nothing to measure.
        """
        controls = {
            name: None if spec == SELF else _control_texts(spec, name, config, folder)
            for name, spec in config.controls().items()
        }
        facts = _facts(config, folder) if config.recall else []
        if not (controls or facts or task or speech or config.lm_eval):
            raise KappaTuneError("forgetting: there is nothing to measure: add control, recall, or a data.test.")
        if config.generate is not None and (not task or isinstance(task[0], ChoiceExample)):
            raise KappaTuneError(
                "forgetting.generate: there is no task to write answers to: give data.test with prompt and completion, "
                "without labels, or delete generate."
            )
        return cls(controls, task or [], facts, speech)


@dataclass
class ForgettingProbe:
    """What is measured, the controls tokenized once.

    Attributes:
        controls: name -> pieces of token ids.
        task, facts: as `ForgettingData` has them, conversations as the tokenizer's chat template writes them.
        generate: settings of `answer_accuracy`; None measures the task by likelihood.
        harness: settings of `harness.run_harness`; None runs none.
        answers: what the model wrote in the last measurement, see `answers.answer_accuracy`; of recordings
            {"said", "heard"}.
        speech: as `ForgettingData` has it.
    """

    tokenizer: PreTrainedTokenizerBase
    controls: dict[str, list[list[int]]] = field(default_factory=dict)
    task: Task = field(default_factory=list)
    facts: list[tuple[str, str]] | list[ChoiceExample] = field(default_factory=list)
    batch_size: int = 8
    generate: dict[str, int] | None = None
    harness: dict[str, Any] | None = None
    answers: list[dict[str, Any]] = field(default_factory=list)
    speech: SpeechTask | None = None

    @classmethod
    def build(
        cls, config: ForgettingConfig, data: ForgettingData, model: nn.Module, tokenizer: PreTrainedTokenizerBase
    ) -> "ForgettingProbe":
        """Tokenize `data`; `model`, without its adapter, writes the texts that are None.

        Raises:
            KappaTuneError: a control without two tokens in a row, a tokenizer without a token to start from, or a
                harness that isn't installed or doesn't know a task.
        """
        harness = config.harness()
        generate = config.generate and config.generate.model_dump(exclude_none=True)
        if harness is not None:
            from kappatune_plugin.forgetting.harness import check_harness

            check_harness(harness["tasks"], harness.get("include_path"))
        truncate = config.long_texts == "truncate"
        controls = {
            name: sample_base(model, tokenizer, config.samples, config.max_length, config.seed, config.batch_size)
            if texts is None
            else blocks(tokenizer, texts, config.max_length, truncate)
            for name, texts in data.controls.items()
        }
        task = [_as_text(tokenizer, each) for each in data.task]
        return cls(tokenizer, controls, task, data.facts, config.batch_size, generate, harness, speech=data.speech)

    def cost(self) -> str:
        """What one measurement reads, for a person who is to wait for it."""
        parts = [f"{name} ({sum(map(len, pieces)):,} tokens)" for name, pieces in self.controls.items()]
        if self.task:
            parts.append(f"{len(self.task)} test examples" + (", written" if self.generate is not None else ""))
        parts += [f"{len(self.speech.rows)} recordings, transcribed"] if self.speech else []
        parts += [f"{len(self.facts)} {'questions' if self._other_task else 'facts'}"] if self.facts else []
        parts += ["the harness"] if self.harness is not None else []
        return ", ".join(parts)

    @property
    def metric(self) -> str | None:
        """How the task is measured; None for no task.

        "accuracy" of likelihoods for a task with labels; without labels "answer_accuracy" of what the model writes if
        `generate` is set, else "loss" (nats a completion token); "wer" of recordings.
        """
        if self.speech is not None:
            return WER
        if not self.task:
            return None
        if isinstance(self.task[0], ChoiceExample):
            return "accuracy"
        return "loss" if self.generate is None else "answer_accuracy"

    def new_report(self) -> ForgettingReport:
        """A report of what this measures, still without values."""
        answers = Counter(each.choices[each.answer] for each in self.task if isinstance(each, ChoiceExample))
        majority = max(answers.values()) / len(self.task) if answers else None
        examples = len(self.task) if self.speech is None else len(self.speech.rows)
        recall = "accuracy" if self._other_task else EXACT_MATCH
        return ForgettingReport(list(self.controls), self.metric, len(self.facts), examples, majority, recall)

    @property
    def _other_task(self) -> bool:
        return bool(self.facts) and isinstance(self.facts[0], ChoiceExample)

    def measure(self, model: nn.Module, quick: bool = False, remember: Remember = measured_now) -> dict[str, float]:
        """The losses and perplexities of the controls, the task's metric, the share of facts recalled, the harness.

        Of a task with labels also the loss of the right ones ("task_loss", nats a token), which a few rows tell apart
        where their accuracy can't.

        Args:
            quick: leave out what writes text or runs the harness: for measurements during a run.
            remember: called for each measure with what it is measured on, as a text, and a function that measures.
        """
        found = {}
        for name, pieces in self.controls.items():
            loss = remember(f"loss {pieces}", lambda pieces=pieces, name=name: self._loss(model, pieces, name))
            found[f"{name}_loss"], found[f"{name}_ppl"] = loss["loss"], loss["ppl"]
        settings = model, self.tokenizer, self.task, self.batch_size
        if self.metric == "accuracy":
            keys = ("task_accuracy", "task_loss")
            found |= remember(f"{keys} {self.task}", lambda: dict(zip(keys, label_scores(*settings), strict=True)))
        if self.metric == "loss":
            found |= remember(f"task_loss {self.task}", lambda: {"task_loss": completion_loss(*settings)})
        if self.facts:
            settings = model, self.tokenizer, self.facts, self.batch_size
            recall = partial(label_accuracy, name="another task") if self._other_task else exact_recall
            found |= remember(f"recall {self.facts}", lambda: {"recall": recall(*settings)})
        return found if quick else {**found, **self._slow(model)}

    def _loss(self, model: nn.Module, pieces: list[list[int]], name: str) -> dict[str, float]:
        loss = token_loss(model, pieces, self.batch_size, name)
        return {"loss": loss.nats_per_token, "ppl": loss.perplexity}

    def _slow(self, model: nn.Module) -> dict[str, float]:
        found = {}
        if self.speech is not None:
            with measuring(model):
                errors = vars(self.speech.measure(model))
            found |= {f"task_{name}": float(value) for name, value in errors.items()}
            pairs_heard = zip(self.speech.rows[TRANSCRIPT], self.speech.written, strict=True)
            self.answers = [{"said": said, "heard": heard} for said, heard in pairs_heard]
        if self.metric == "answer_accuracy":
            settings = {"batch_size": self.batch_size, **self.generate}
            self.answers = []
            found["task_answer_accuracy"] = answer_accuracy(
                model, self.tokenizer, self.task, **settings, written=self.answers
            )
        if self.harness is not None:
            from kappatune_plugin.forgetting.harness import run_harness

            found |= run_harness(model, self.tokenizer, batch_size=self.batch_size, **self.harness)
        return found

    def divergences(self, model: nn.Module) -> dict[str, float]:
        """KL(base || model) a token in nats: on each control, and on the completions of the task as `task_kl`."""
        found = {
            f"{name}_kl": kl_to_base(model, pieces, self.batch_size, name=f"{name}, KL to the base")
            for name, pieces in self.controls.items()
        }
        if self.task:
            found["task_kl"] = completion_kl(model, self.tokenizer, task_pairs(self.task), self.batch_size)
        return found


def _as_text(tokenizer: PreTrainedTokenizerBase, example: Any) -> ChoiceExample | tuple[str, str]:
    """An example of a task with its messages as text. Raises KappaTuneError if there is no template for them."""
    if isinstance(example, ChoiceExample):
        if isinstance(example.prompt, str):
            return example
        written = [_as_text(tokenizer, (example.prompt, choice)) for choice in example.choices]
        return ChoiceExample(written[0][0], tuple(text for _, text in written), example.answer)
    prompt, completion = example
    if isinstance(prompt, str):
        return example
    if not tokenizer.chat_template:
        raise KappaTuneError(
            "data.test holds conversations, and the tokenizer has no chat template to write them with: give "
            "chat_template_path, or test rows with prompt and completion as texts."
        )
    asked = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(prompt + completion, tokenize=False)
    if not whole.startswith(asked):
        raise KappaTuneError(
            "data.test: the tokenizer's chat template writes a question in another way when its answer follows, so "
            "the answer can't be told from it. Give test rows with prompt and completion as texts."
        )
    # templates write the start token, and tokenizers add it
    start = tokenizer.bos_token if tokenizer("").input_ids[:1] == [tokenizer.bos_token_id] else ""
    return asked.removeprefix(start or ""), whole[len(asked) :]


def task_pairs(task: Task) -> list[tuple[str, str]]:
    """(prompt, right completion) of each test example."""
    return [(each.prompt, each.choices[each.answer]) if isinstance(each, ChoiceExample) else each for each in task]


def _control_texts(spec: Mapping[str, Any], name: str, config: ForgettingConfig, folder: Path | None) -> list[str]:
    spec = dict(spec) if isinstance(spec, Mapping) else {"path": spec}
    column = spec.pop("text_column", None) or config.text_column
    rows = load_rows(spec, f"forgetting.control {name}", folder)
    if column not in rows.column_names:
        raise KappaTuneError(
            f"forgetting.text_column: control {name} has no column '{column}', only {', '.join(rows.column_names)}."
        )
    texts = [text for text in rows[column] if text is not None]
    if other := next((each for each in texts if not isinstance(each, str)), None):
        raise KappaTuneError(
            f"forgetting.control {name}: its column '{column}' holds {other!r:.60}, which is no text. Give text_column."
        )
    texts = [text for text in texts if text.strip()]
    if config.running_text:
        return ["\n\n".join(texts)]
    # at even distances over all of them: the first ones of a file are alike
    count = min(config.max_samples or len(texts), len(texts))
    return [texts[position * len(texts) // count] for position in range(count)]


def _facts(config: ForgettingConfig, folder: Path | None) -> list[tuple[str, str]] | list[ChoiceExample]:
    asked = config.recall
    own = {"prompt", "completion", "labels", "label_column"}
    rows = load_rows(asked.model_dump(exclude_unset=True, exclude=own), "forgetting.recall", folder)
    if asked.labels is None:
        return pairs(rows, asked.prompt, asked.completion)[: config.max_samples]
    return choice_examples(rows, asked.prompt, asked.completion, asked.labels, asked.label_column)[: config.max_samples]
