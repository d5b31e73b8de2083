"""Tiny models with their tokenizer, and data in the forms that toolkits read: `python make_tiny.py FOLDER`.

To be run with the toolkit's own transformers: a tokenizer saved by transformers 5 doesn't load in transformers 4.
"""

import json
import random
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.tiny import tiny_model, tiny_tokenizer

MODELS = {"tiny-llama": "llama", "tiny-olmoe": "olmoe"}
TEMPLATE = (
    "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)
WORDS = "the cat dog sat on mat red blue sky how many legs does a bird have two four six where when run jump".split()
ROWS = 64
# Alpaca's prompt alone is 300 tokens of this tokenizer
LENGTH = 1024


def make_tiny(folder: Path) -> None:
    """Write the models, alpaca.jsonl, chat.jsonl, dpo.jsonl, text.jsonl and LLaMA-Factory's dataset_info.json."""
    for name, kind in MODELS.items():
        model, tokenizer = tiny_model(kind, vocab_size=300, max_position_embeddings=LENGTH), tiny_tokenizer()
        tokenizer.chat_template, tokenizer.model_max_length = TEMPLATE, LENGTH
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    draw = random.Random(0)
    pairs = [(" ".join(draw.choices(WORDS, k=6)), " ".join(draw.choices(WORDS, k=8))) for _ in range(ROWS)]
    worse = [" ".join(draw.choices(WORDS, k=8)) for _ in range(ROWS)]
    _write(folder / "alpaca.jsonl", ({"instruction": q, "input": "", "output": a} for q, a in pairs))
    _write(folder / "text.jsonl", ({"text": f"{q} {a}"} for q, a in pairs))
    _write(folder / "chat.jsonl", ({"messages": _messages(q, a)} for q, a in pairs))
    rows = zip(pairs, worse, strict=True)
    _write(folder / "dpo.jsonl", ({"prompt": q, "chosen": a, "rejected": b} for (q, a), b in rows))
    columns = {name: name for name in ("prompt", "chosen", "rejected")}
    info = {
        "tiny": {"file_name": "alpaca.jsonl"},
        "pairs": {"file_name": "dpo.jsonl", "ranking": True, "columns": columns},
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))


def _messages(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _write(path: Path, rows: Iterable[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    make_tiny(Path(sys.argv[1]))
