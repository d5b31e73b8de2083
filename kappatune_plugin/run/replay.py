"""`data.replay` in a run: texts that the base model writes, or those of a data set, beside the task's rows.

They are token ids, trained on as they were written: no token of them is left out of the loss, and one that the length
cut off gets no end token.
"""

import hashlib
import json
import math
import random
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets
from torch import nn
from tqdm import tqdm
from trl import SFTTrainer, pack_dataset

from kappatune_plugin.data.examples import IGNORED
from kappatune_plugin.data.replay import SELF, ReplayConfig
from kappatune_plugin.data.rows import load_rows
from kappatune_plugin.distributed import ranks, shards
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.files import read_json, write_json
from kappatune_plugin.forgetting.measures import blocks, sample_base
from kappatune_plugin.run.end_token import labels_of, tokenizer_of
from kappatune_plugin.scanning.cache import Cache, cache_folder
from kappatune_plugin.tuner.plain_lora import decided
from kappatune_plugin.weights.quantized import quantization_of

# what TRL's collators read of a prepared row; all of a text is learned
COLUMNS = ("input_ids", "labels", "completion_mask", "assistant_masks")
FILE = "replay.json"


def replay_texts(
    config: ReplayConfig,
    count: int,
    model: nn.Module,
    base: str,
    tokenizer: Any,
    max_length: int | None = None,
    folder: Path | None = None,
) -> list[list[int]]:
    """`count` texts as token ids, the same for every number of ranks. Collective.

    Args:
        model: writes them, without its adapter.
        base: the fingerprint of its weights.
        max_length: of the trainer; None for no limit.
        folder: where relative paths of a data set may start.

    Raises:
        KappaTuneError: a data set that can't be loaded or has too few texts, or a base that can't write because its
            weights are divided over the ranks.
    """
    length = min(config.max_length, max_length or config.max_length)
    if config.source != SELF:
        return _from_data(config, count, tokenizer, length, folder)
    identity = (base, quantization_of(model), str(model.dtype), tokenizer.bos_token_id, tokenizer.eos_token_id)
    return _written(config, count, model, tokenizer, length, json.dumps([*map(str, identity), len(tokenizer)]))


def _from_data(config: ReplayConfig, count: int, tokenizer: Any, length: int, folder: Path | None) -> list[list[int]]:
    spec = dict(config.source)
    column = spec.pop("text_column", "text")
    rows = load_rows(spec, "data.replay.from", folder)
    if column not in rows.column_names:
        raise KappaTuneError(
            f"data.replay.from: the rows have no column '{column}', only {', '.join(rows.column_names)}. Name the "
            "texts' column: {path: ..., text_column: NAME}."
        )
    texts = [text for text in rows[column] if text and text.strip()]
    pieces = blocks(tokenizer, [text + (tokenizer.eos_token or "") for text in texts], length) if texts else []
    if len(pieces) < count:
        raise KappaTuneError(
            f"data.replay.from: '{spec['path']}' gives {len(pieces)} texts of at most {length} tokens, and share "
            f"{config.share:g} takes {count}: give more text, or lower share."
        )
    return random.Random(config.seed).sample(pieces, count)


def _written(
    config: ReplayConfig, count: int, model: nn.Module, tokenizer: Any, length: int, identity: str
) -> list[list[int]]:
    """What the base writes, batch by batch, each with a seed of its own: kept in the cache, dealt over the ranks."""
    cache, size = Cache(cache_folder()), config.batch_size
    seeds = [batch_seed(config.seed, batch) for batch in range(math.ceil(count / size))]
    keys = {seed: f"{identity} {length} {size} {seed}" for seed in seeds}
    found = {seed: cache.written(key) for seed, key in keys.items()} if ranks.rank() == 0 else {}
    known = ranks.from_first({seed: rows for seed, rows in found.items() if rows is not None})
    missing = [seed for seed in seeds if seed not in known]
    if missing and any(shards.is_partitioned(parameter) for parameter in model.parameters()):
        raise KappaTuneError(
            "data.replay: from: self: no rank holds the whole model that is to write (ZeRO-3). Run the recipe once "
            "without ZeRO-3 and with `--max_steps 1`: what the base writes then is kept in the cache "
            "($KAPPATUNE_CACHE) and found there. Or give a data set: `from: {path: texts.jsonl}`."
        )
    writers = 1 if shards.first_rank_loads() else ranks.world()
    mine = missing[ranks.rank() :: writers] if ranks.rank() < writers else []
    new = {}
    for seed in tqdm(mine, desc="The base writes text for data.replay", unit="batch", disable=ranks.rank() > 0 or None):
        new[seed] = sample_base(model, tokenizer, size, length, seed, size)
        cache.keep_written(keys[seed], new[seed])
    for part in ranks.exchange(new):
        known |= part
    return [row for seed in seeds for row in known[seed]][:count]


def batch_seed(seed: int, batch: int) -> int:
    """The seed that the base writes a batch with: 32 bits, as many as torch's generator on the CPU takes.

    Hashed, to be none of the small seeds that `forgetting: {control: self}` writes with: what is learned must not be
    what forgetting is measured on.
    """
    return int.from_bytes(hashlib.blake2b(f"replay {seed} {batch}".encode(), digest_size=4).digest(), "big")


def mix_replay(
    config: ReplayConfig, trainer: SFTTrainer, rows: int, folder: Path | None = None, resumes: bool = False
) -> str:
    """Put texts evenly between the trainer's prepared rows; they are kept in replay.json of its output_dir.

    Args:
        rows: of the task, before packing put several in one.
        folder: where relative paths of a data set may start.
        resumes: take the texts of the run that is resumed from its replay.json, if it was made by the same settings.

    Returns:
        What it costs, in words.

    Raises:
        KappaTuneError: as `replay_texts`, or rows that aren't tokens.
    """
    if "input_ids" not in (getattr(trainer.train_dataset, "column_names", None) or ()):
        raise KappaTuneError("data.replay mixes texts: the training rows are streamed, or hold more than text.")
    tokenizer, base = tokenizer_of(trainer), decided(trainer.model).selection.base["hash"]
    count = config.texts(rows)
    path, made_by = Path(trainer.args.output_dir) / FILE, f"{base} {count} {config}"
    texts = ranks.from_first(_of_earlier_run(path, made_by) if resumes and ranks.rank() == 0 else None)
    if texts is None:
        texts = replay_texts(config, count, trainer.model, base, tokenizer, trainer.args.max_length, folder)
    if trainer.is_world_process_zero():
        # ids as one string: a list would take a line for each
        shown = [{"text": tokenizer.decode(ids), "ids": " ".join(map(str, ids))} for ids in texts]
        write_json(path, {"made_by": made_by, "rows": shown})
    task = trainer.train_dataset
    trainer.train_dataset, _ = mixed(task, texts, trainer.args)
    return _cost(config, texts, task, trainer.completion_only_loss)


def _of_earlier_run(path: Path, made_by: str) -> list[list[int]] | None:
    if not path.exists():
        return None
    content = read_json(path, "the texts of data.replay")
    if content.get("made_by") != made_by:
        return None
    return [[int(token) for token in row["ids"].split()] for row in content["rows"]]


def mixed(task: Dataset, texts: list[list[int]], args: Any) -> tuple[Dataset, Dataset]:
    """The rows of `task`, as TRL prepared them, in their order, with `texts` evenly between them; and `texts` alone.

    Args:
        args: the trainer's, which say how rows are packed.

    Returns:
        Both with the columns that TRL's collator reads; every token of a text is in the loss.
    """
    task = task.select_columns([name for name in (*COLUMNS, "seq_lengths") if name in task.column_names])
    written = _prepared(task, texts, args)
    both = concatenate_datasets([task, written])
    sizes = len(task), len(written)
    places = [((row + 0.5) / size, part, row) for part, size in enumerate(sizes) for row in range(size)]
    return both.select([row + part * len(task) for _, part, row in sorted(places)]), written


def _prepared(task: Dataset, texts: list[list[int]], args: Any) -> Dataset:
    """`texts` as rows with the columns of `task`, packed where `args` say so."""
    learned = [[1] * len(ids) for ids in texts]
    columns = {"input_ids": texts, "labels": texts, "completion_mask": learned, "assistant_masks": learned}
    written = Dataset.from_dict({name: values for name, values in columns.items() if name in task.column_names})
    if args.packing:
        written = pack_dataset(written, args.max_length, args.packing_strategy)
    return written.select_columns(task.column_names).cast(task.features)


def _cost(config: ReplayConfig, texts: list[list[int]], task: Dataset, completion_only: bool) -> str:
    more, read, learned = sum(len(ids) for ids in texts), 0, 0
    for row in task:
        labels = labels_of(row, completion_only)
        read, learned = read + len(labels), learned + sum(label != IGNORED for label in labels)
    by = "the base wrote" if config.source == SELF else f"are from {config.source['path']}"
    return (
        f"Replay: {len(texts):,} texts of {more:,} tokens, which {by}, beside the task's {read:,} tokens, {learned:,} "
        f"of them in the loss: an epoch reads {(more + read) / read:.2f} times as many tokens, and "
        f"{more / (more + learned):.0%} of the tokens in the loss are replay."
    )
