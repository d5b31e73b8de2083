"""Makes the quickstart's model, tokenizer, task, facts and control text from a seed.

    python recipes/quickstart/make.py --output_dir recipes/quickstart

Takes twenty minutes to an hour on one CPU core. The text is the same on every machine; the trained weights are the same
only for the same versions and number of threads.
"""

import argparse
import itertools
import json
import math
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from corpus import Fact, facts, letters, pretraining_texts, question, story, sum_text
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

PEOPLE, TOWNS = 100, 20
VOCABULARY = 1024
LENGTH = 128
SEEDS = {"facts": 0, "pretraining": 1, "train": 2, "test": 3, "control": 4, "weights": 5}


def tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that splits numbers into digits and gives back every text exactly."""
    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<eos>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_max_length=2 * LENGTH,
    )


def new_model(tokens: PreTrainedTokenizerFast) -> OlmoeForCausalLM:
    """4 layers of 16 experts, 2 of them for each token."""
    torch.manual_seed(SEEDS["weights"])
    config = OlmoeConfig(
        vocab_size=len(tokens),
        hidden_size=128,
        intermediate_size=160,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=16,
        num_experts_per_tok=2,
        max_position_embeddings=2 * LENGTH,
        pad_token_id=tokens.pad_token_id,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        router_aux_loss_coef=0.02,
    )
    return OlmoeForCausalLM(config)


def batches(tokens: PreTrainedTokenizerFast, known: list[Fact], size: int) -> Iterator[Tensor]:
    """Packed token ids (size, LENGTH), texts divided by the end token."""
    texts = pretraining_texts(known, SEEDS["pretraining"])
    stream: list[int] = []
    while True:
        while len(stream) < size * LENGTH:
            chunk = list(itertools.islice(texts, 500))
            for ids in tokens(chunk).input_ids:
                stream += [*ids, tokens.eos_token_id]
        yield torch.tensor(stream[: size * LENGTH]).view(size, LENGTH)
        stream = stream[size * LENGTH :]


def pretrain(model: OlmoeForCausalLM, data: Iterator[Tensor], steps: int, lr: float) -> None:
    """AdamW with a warm-up of 200 steps and a cosine to zero, router load balancing on."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.05)
    started = time.monotonic()
    model.train()
    for step in range(steps):
        rate = lr * min(1.0, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = next(data)
        loss = model(input_ids=batch, labels=batch, output_router_logits=True).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            minutes = (time.monotonic() - started) / 60
            left = minutes * (steps - step - 1) / (step + 1)
            print(f"step {step:5} loss {loss.item():.3f}  {minutes:.1f} min, {left:.1f} left", flush=True)


@torch.no_grad()
def greedy_share(model: OlmoeForCausalLM, tokens: PreTrainedTokenizerFast, pairs: list[tuple[str, str]]) -> float:
    """Share of (prompt, answer) pairs whose answer is what greedy decoding gives."""
    right = 0
    for prompt, answer in pairs:
        ids, target = tokens(prompt).input_ids, tokens(answer).input_ids
        predicted = model(torch.tensor([ids + target])).logits[0, len(ids) - 1 : -1].argmax(-1).tolist()
        right += predicted == target
    return right / len(pairs)


@torch.no_grad()
def loss_per_token(model: OlmoeForCausalLM, tokens: PreTrainedTokenizerFast, texts: list[str]) -> float:
    """Mean next-token loss in nats over all tokens of `texts`."""
    total = count = 0
    for ids in tokens(texts).input_ids:
        logits = model(torch.tensor([ids])).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum").item()
        count += len(ids) - 1
    return total / count


@torch.no_grad()
def end_token_loss(model: OlmoeForCausalLM, tokens: PreTrainedTokenizerFast) -> float:
    """Mean loss in nats of the end token behind the right answer to the task's rows."""
    total = 0.0
    rows = letters(200, SEEDS["test"])
    for row in rows:
        ids = tokens(f"Letter: {row['text']}\nTone: {'good' if row['label'] else 'bad'}").input_ids
        total -= model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)[tokens.eos_token_id].item()
    return total / len(rows)


@torch.no_grad()
def expert_load(model: OlmoeForCausalLM, tokens: PreTrainedTokenizerFast, texts: list[str]) -> list[list[float]]:
    """For each layer the smallest and largest share of tokens' choices that one expert gets."""
    counts = torch.zeros(model.config.num_hidden_layers, model.config.num_experts)
    for ids in tokens(texts).input_ids:
        routing = model(torch.tensor([ids]), output_router_logits=True).router_logits
        for layer, logits in enumerate(routing):
            chosen = logits.topk(model.config.num_experts_per_tok).indices.flatten()
            counts[layer] += torch.bincount(chosen, minlength=model.config.num_experts)
    shares = counts / counts.sum(1, keepdim=True)
    return [[round(row.min().item(), 4), round(row.max().item(), 4)] for row in shares]


def control_texts(count: int) -> list[str]:
    """Stories and sums from a seed that pretraining doesn't use."""
    rng = random.Random(SEEDS["control"])
    return [story(rng) if index % 4 else sum_text(rng) for index in range(count)]


def write_rows(path: Path, rows: list[dict]) -> None:
    """One JSON object a line; the file is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(temporary, path)


def write_data(folder: Path, known: list[Fact]) -> None:
    """The task's rows, the facts to recall and the control text."""
    train = letters(480, SEEDS["train"])
    write_rows(folder / "task_train.jsonl", train)
    write_rows(folder / "task_test.jsonl", letters(200, SEEDS["test"], frozenset(row["text"] for row in train)))
    write_rows(folder / "facts.jsonl", [{"question": question(fact), "answer": f" {fact.answer}"} for fact in known])
    write_rows(folder / "control.jsonl", [{"text": text} for text in control_texts(240)])


def measure(folder: Path, known: list[Fact]) -> dict:
    """What the saved bfloat16 model knows."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = PreTrainedTokenizerFast.from_pretrained(folder)
    rng = random.Random(SEEDS["test"])
    sums = [sum_text(rng).rpartition(" ") for _ in range(200)]
    stories = [text for text in control_texts(240) if "=" not in text]
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "facts": len(known),
        "recall": greedy_share(model, tokens, [(question(fact), f" {fact.answer}") for fact in known]),
        "sums_right": greedy_share(model, tokens, [(start, f" {result}") for start, _, result in sums]),
        "story_loss": loss_per_token(model, tokens, stories),
        "end_token_loss": end_token_loss(model, tokens),
        "expert_load": expert_load(model, tokens, stories[:40]),
    }


def save_tokenizer(tokens: PreTrainedTokenizerFast, folder: Path) -> None:
    """As transformers 4 reads it too: the class name that transformers 5 writes is unknown there."""
    tokens.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    known = facts(PEOPLE, TOWNS, SEEDS["facts"])
    write_data(args.output_dir / "data", known)
    sample = list(itertools.islice(pretraining_texts(known, SEEDS["pretraining"]), 20_000))
    tokens = tokenizer(sample)
    assert all(tokens.decode(tokens(text).input_ids) == text for text in sample[:500])
    model = new_model(tokens)
    print(f"{model.num_parameters():,} parameters, {len(tokens)} tokens, {len(known)} facts", flush=True)
    pretrain(model, batches(tokens, known, args.batch_size), args.steps, args.learning_rate)
    folder = args.output_dir / "model"
    model.to(torch.bfloat16).save_pretrained(folder)
    save_tokenizer(tokens, folder)
    measured = {"steps": args.steps, "batch_size": args.batch_size, **measure(folder, known)}
    (folder / "pretraining.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
