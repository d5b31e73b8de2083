import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# workers of pytest -n that each take every core wait for one another
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

from pathlib import Path

import pytest
import torch

from helpers.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="session")
def saved_olmoe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny OLMoE of vocabulary 300 with its tokenizer, saved as a hub model is. Read only."""
    folder = tmp_path_factory.mktemp("olmoe")
    tiny_model("olmoe", vocab_size=300).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAPPATUNE_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    torch.manual_seed(0)
