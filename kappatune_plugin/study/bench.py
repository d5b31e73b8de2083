"""What all runs of a comparison share: the base model, the data as TRL prepared it, and what is measured."""

import copy
import hashlib
import json
import math
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from trl import SFTConfig, SFTTrainer

from kappatune_plugin.data.replay import ReplayConfig
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.forgetting.config import SELF
from kappatune_plugin.forgetting.measures import blocks, kl_to_base
from kappatune_plugin.forgetting.probe import ForgettingData, ForgettingProbe, task_pairs
from kappatune_plugin.recipe.load_model import load_base
from kappatune_plugin.recipe.load_rows import load_data, task_examples
from kappatune_plugin.recipe.measure_on_rows import with_scores
from kappatune_plugin.recipe.recipe import Recipe, load_recipe
from kappatune_plugin.run.end_token import leave_out_end_token
from kappatune_plugin.run.replay import mixed, replay_texts
from kappatune_plugin.selection.criteria import ON_ROWS
from kappatune_plugin.study.method_configs import Pool
from kappatune_plugin.study.methods import Method
from kappatune_plugin.tuner.config import LORA_KEYS, KappaTuneConfig
from kappatune_plugin.tuner.what_to_train import full_report
from kappatune_plugin.weights.model_source import ModelSource
from kappatune_plugin.weights.quantized import keep_unpacked, quantization_of

# one run a process, no files of its own, a loss after every step
SETTINGS = {
    "logging_steps": 1,
    "logging_nan_inf_filter": "false",
    "save_strategy": "no",
    "eval_strategy": "no",
    "load_best_model_at_end": "false",
    "report_to": "none",
    "push_to_hub": "false",
    "disable_tqdm": "true",
    "dataloader_num_workers": 0,
}
TASK_TEXTS = 64


@dataclass
class Bench:
    """What all runs of a comparison share.

    Attributes:
        path, overrides: of the recipe.
        recipe: the recipe with the overrides.
        base: the model before training; runs train copies of it.
        tokenizer: the model's.
        train, validation: rows as TRL prepares them; no method trains on `validation`.
        probe: what is measured; task_text: the token ids of test prompts with their right completions.
        pool: what may be trained.
        hashes: fingerprints of the base's weights and of the data.
        rows: how many rows of the task `train` was made of, before packing.
        kl: whether the divergence from the base is measured too, which takes two more passes over each control.
    """

    path: Path
    overrides: list[str]
    recipe: Recipe
    base: nn.Module
    tokenizer: Any
    train: Dataset
    validation: Dataset
    probe: ForgettingProbe
    task_text: list[list[int]]
    pool: Pool
    hashes: dict[str, str]
    rows: int
    kl: bool = True

    @classmethod
    def load(
        cls,
        path: Path,
        overrides: Iterable[str] = (),
        validation: float = 0.1,
        ranks: Collection[str] = (),
        kl: bool = True,
    ) -> "Bench":
        """Load everything that the recipe at `path` names.

        Args:
            overrides: of the recipe, as on the command line.
            validation: the share of training rows held out to choose learning rates on.
            ranks: criteria of the methods, in addition to the recipe's `rank_by`.
            kl: as the attribute.

        Raises:
            KappaTuneError: all that `kappatune sft` raises; also for a recipe that measures no forgetting or brings its
                own selection, and for too few rows to hold some out.
        """
        overrides = list(overrides)
        recipe = load_recipe(path, [*overrides, *_flags(SETTINGS)])
        check_comparable(recipe)
        rows, test = load_data(recipe)
        learned, held_out = _split(rows, validation)
        task = task_examples(recipe.data, test)
        data = ForgettingData.load(recipe.forgetting, task, recipe.folder)
        base = load_base(recipe)
        keep_unpacked(base)
        tokenizer, train, held_out = _prepared(recipe, base, learned, held_out)
        ranks = {*ranks, recipe.kappatune.rank_by}
        rank_by = "snr" if "snr" in ranks else "kappa"
        found = ModelSource(base).base_hashes()
        hashes = {"base": found.today}
        report = full_report(recipe.kappatune, base, found, rank_by)
        with placed(base, recipe.training_args.device):
            for rank in sorted(ranks & set(ON_ROWS)):
                report = with_scores(recipe, base, tokenizer, learned, report, rank)
            probe = ForgettingProbe.build(recipe.forgetting, data, base, tokenizer)
        texts = ["".join(pair) for pair in task_pairs(probe.task[:TASK_TEXTS])]
        hashes["data"] = _digest([*_rows(train), "held out", *_rows(held_out)])
        return cls(
            Path(path),
            overrides,
            recipe,
            base,
            tokenizer,
            train,
            held_out,
            probe,
            blocks(tokenizer, texts, recipe.forgetting.max_length) if texts else [],
            Pool.of(report, recipe.kappatune.budget, recipe.kappatune.rank_by, _pairs(recipe.kappatune)),
            hashes,
            len(learned),
            kl,
        )

    def arguments(self, learning_rate: float, seed: int, output_dir: Path) -> SFTConfig:
        """The recipe's training arguments, with those that a run sets."""
        changes = {"learning_rate": learning_rate, "seed": seed, "data_seed": seed, "output_dir": output_dir}
        args = load_recipe(self.path, [*self.overrides, *_flags({**SETTINGS, **changes})]).training_args
        args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
        return args

    def replay(self, method: Method) -> ReplayConfig | None:
        """What is mixed into the rows of `method`: its own share, or what the recipe says."""
        if method.replay is None or self.recipe.replay is None:
            return ReplayConfig(share=method.replay) if method.replay else self.recipe.replay
        return self.recipe.replay.model_copy(update={"share": method.replay}) if method.replay else None

    def replayed(self, replay: ReplayConfig) -> tuple[Dataset, Dataset]:
        """The training rows with the texts of `replay` between them, and those texts alone, prepared likewise."""
        args = self.recipe.training_args
        limits, count = (args.max_length, self.recipe.folder), replay.texts(self.rows)
        with placed(self.base, args.device):
            texts = replay_texts(replay, count, self.base, self.hashes["base"], self.tokenizer, *limits)
        return mixed(self.train, texts, args)

    def before(self) -> dict[str, float]:
        """`measure` of the base, where and as precisely as what is trained from it."""
        with placed(self.base, self.recipe.training_args.device), self.precision():
            return self.measure(self.base)

    def measure(self, model: nn.Module, quick: bool = False) -> dict[str, float]:
        """`ForgettingProbe.measure`, and with `kl` KL(base || model) per token on each control and on the task's text.

        `task_text_kl` is over the whole text of at most 64 test examples, the prompt as well as the answer.
        """
        texts = {**self.probe.controls, **({"task_text": self.task_text} if self.task_text else {})} if self.kl else {}
        size = self.probe.batch_size
        divergences = {f"{name}_kl": kl_to_base(model, pieces, size) for name, pieces in texts.items()}
        return {**self.probe.measure(model, quick), **divergences}

    def precision(self) -> torch.autocast:
        """The mixed precision that the recipe trains in, for the base and for merged models: rounding would count as
        forgetting without it. A Trainer puts it around its own model, which must not be inside another."""
        args = self.recipe.training_args
        dtype, mixed = torch.float16 if args.fp16 else torch.bfloat16, args.fp16 or args.bf16
        # a cached copy of a weight would stay what it was when the weight is scaled
        return torch.autocast(args.device.type, dtype, mixed, cache_enabled=False)

    @property
    def steps(self) -> int:
        """Optimizer steps of a whole run."""
        args = self.recipe.training_args
        if args.max_steps > 0:
            return args.max_steps
        batch = args.train_batch_size * args.gradient_accumulation_steps
        return math.ceil(math.ceil(len(self.train) / batch) * args.num_train_epochs)

    @property
    def identity(self) -> str:
        """A digest of everything that decides a run's result, except the run's own settings."""
        ignored = ("output_dir", "seed", "learning_rate", "env")
        resolved = {key: value for key, value in self.recipe.resolved.items() if key not in ignored}
        # text written by the base follows from the base, and on a GPU isn't reproducible to the token
        written = [name for name, spec in self.recipe.forgetting.controls().items() if spec == SELF]
        controls = {name: pieces for name, pieces in self.probe.controls.items() if name not in written}
        without = [] if self.kl else ["no KL"]
        return _digest([resolved, self.hashes, controls, self.probe.task, self.probe.facts, *without])


@contextmanager
def placed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """`model` on `device` while the context lasts; a quantized one stays where it is."""
    here, moves = model.device, quantization_of(model) is None
    if moves:
        model.to(device)
    try:
        yield
    finally:
        if moves:
            model.to(here)


def _flags(settings: dict[str, Any]) -> list[str]:
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


def check_comparable(recipe: Recipe) -> None:
    """Raise KappaTuneError with everything in `recipe` that methods can't be compared on."""
    problems = []
    if recipe.forgetting is None:
        problems.append("the block forgetting is missing: add `forgetting: {control: self}`.")
    if recipe.audio is not None:
        problems.append(
            "audio: a comparison measures tasks of text. Run `kappatune sft` once for each order and budget."
        )
    if recipe.auto is not None:
        problems.append("kappatune.k: auto decides while it trains: give a budget, such as the one that it found.")
    if recipe.kappatune.selection is not None:
        problems.append("kappatune.selection is given, and a comparison selects by itself: write k instead.")
    for key in ("scan_from", "modules_to_save", "match"):
        if getattr(recipe.kappatune, key) is not None:
            problems.append(f"kappatune.{key} is given, and a comparison doesn't take it: delete it.")
    if recipe.training_args.world_size > 1:
        problems.append(f"it runs on one process, and {recipe.training_args.world_size} are running.")
    if problems:
        raise KappaTuneError("\n  - ".join(["compare:", *problems]))


def _pairs(config: KappaTuneConfig) -> dict[str, Any]:
    return {key: getattr(config, key) for key in ("adapter", *LORA_KEYS) if getattr(config, key) is not None}


def _split(rows: Dataset, share: float) -> tuple[Dataset, Dataset]:
    if not isinstance(rows, Dataset):
        raise KappaTuneError("compare: data that is streamed can't be held out: delete dataset_streaming.")
    if not 0 < share < 1:
        raise KappaTuneError(f"validation: {share} is not a share between 0 and 1, such as 0.1.")
    held_out = max(1, round(share * len(rows)))
    if held_out >= len(rows):
        raise KappaTuneError(f"validation: {len(rows)} training rows are too few to hold {held_out} out.")
    parts = rows.train_test_split(test_size=held_out, seed=0)
    return parts["train"], parts["test"]


def _prepared(recipe: Recipe, base: nn.Module, train: Dataset, held_out: Dataset) -> tuple[Any, Dataset, Dataset]:
    """The tokenizer, and the rows tokenized as SFTTrainer does it."""
    # a copy: TRL wraps the forward of the model that it gets, and the wrapping would follow the copies of the base
    model = copy.deepcopy(base)
    # nothing is trained here, and a Trainer refuses a quantized model without an adapter
    model.is_quantized = False
    trainer = SFTTrainer(model, recipe.training_args, train_dataset=train, eval_dataset=held_out)
    if not recipe.end_token:
        leave_out_end_token(trainer)
    return trainer.processing_class, trainer.train_dataset, trainer.eval_dataset


def _rows(rows: Dataset) -> list[Any]:
    return [rows[name][:] for name in sorted(rows.column_names) if name in ("input_ids", "labels")]


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
