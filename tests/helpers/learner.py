"""A tiny model that knows one made-up language and is trained on another: something to learn, something to forget."""

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from helpers.tiny import tiny_model

Document = list[tuple[list[int], int]]


def documents(seed: int, count: int, shift: int, length: int = 12) -> list[Document]:
    """Texts of a language whose next token is mostly 3 * token + `shift`; one piece of `length` tokens each."""
    random, found = np.random.default_rng(seed), []
    for _ in range(count):
        text = [int(random.integers(3, 60))]
        while len(text) < length:
            known = random.random() < 0.9
            text.append((text[-1] * 3 + shift) % 57 + 3 if known else int(random.integers(3, 60)))
        found.append([(text, 1)])
    return found


def train(model: nn.Module, texts: list[Document], steps: int, rate: float, seed: int = 0) -> nn.Module:
    """`model` after `steps` steps of Adam on mini-batches of 16."""
    ids, random = torch.tensor([pieces[0][0] for pieces in texts]), np.random.default_rng(seed)
    optimizer = torch.optim.Adam([each for each in model.parameters() if each.requires_grad], lr=rate)
    for _ in range(steps):
        batch = ids[random.choice(len(ids), min(16, len(ids)), replace=False)]
        logits = model(input_ids=batch).logits[:, :-1]
        cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def learner(kind: str = "llama", steps: int = 150) -> nn.Module:
    """A model that knows the language of shift 1."""
    return train(tiny_model(kind), documents(1, 200, 1), steps, 1e-2)


def loss(model: nn.Module, texts: list[Document]) -> float:
    """Mean nats a token, one text after the other: the slow reference."""
    nats, count = 0.0, 0
    with torch.no_grad():
        for [(ids, start)] in texts:
            scores = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
            for position in range(start, len(ids)):
                nats, count = nats - scores[position - 1, ids[position]].item(), count + 1
    return nats / count
