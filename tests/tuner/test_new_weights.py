"""Tokens and task heads that the checkpoint doesn't hold are other random numbers in each process."""

import copy
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from helpers.loops import TOKENS, logits, train
from helpers.tiny import tiny_model, tiny_tokenizer
from kappatune_plugin import KappaTuneConfig, KappaTuneError, scan

VOCABULARY = len(tiny_tokenizer())
IDS = torch.tensor([[3, 4, VOCABULARY + 1, 5]])
# two outputs of `loaded`, in a process with another seed
IN_ANOTHER_PROCESS = """
import sys
from pathlib import Path
import torch
sys.path[:0] = [sys.argv[1]]
from tuner.test_new_weights import loaded_with_new_head, loaded_with_new_tokens, outputs
torch.manual_seed(7)
folder = Path(sys.argv[2])
torch.save([outputs(loaded_with_new_tokens(folder)), outputs(loaded_with_new_head(folder))], folder / "outputs.pt")
"""


def grown_tokenizer(count: int) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<t{number}>" for number in range(count)]})
    return tokenizer


def outputs(model: nn.Module) -> torch.Tensor:
    return logits(model, input_ids=IDS if model.get_input_embeddings().weight.shape[0] > VOCABULARY else TOKENS)


def with_new_tokens(folder: Path) -> nn.Module:
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    base.resize_token_embeddings(VOCABULARY + 2)
    return base


def loaded_with_new_tokens(folder: Path) -> nn.Module:
    return PeftModel.from_pretrained(with_new_tokens(folder), folder / "tokens")


def loaded_with_new_head(folder: Path) -> nn.Module:
    base = AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=3)
    return PeftModel.from_pretrained(base, folder / "head")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, nn.Module, nn.Module]:
    """A base and two adapters in a folder, and the models that were saved: with new tokens, and with a new head."""
    folder = tmp_path_factory.mktemp("new")
    torch.manual_seed(1)
    tiny_model("llama", vocab_size=VOCABULARY).save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    tokens = get_peft_model(with_new_tokens(folder), KappaTuneConfig(k=4, task_type="CAUSAL_LM"))
    train(tokens, input_ids=IDS, labels=IDS)
    tokens.save_pretrained(folder / "tokens")
    grown_tokenizer(2).save_pretrained(folder / "tokens")
    head = AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=3)
    head = get_peft_model(head, KappaTuneConfig(k=4, task_type="SEQ_CLS"))
    train(head, input_ids=TOKENS, labels=torch.arange(len(TOKENS)) % 3)
    head.save_pretrained(folder / "head")
    return folder, tokens, head


@pytest.mark.slow
def test_another_process_with_another_seed_loads_the_same(trained):
    folder, tokens, head = trained
    tests = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", IN_ANOTHER_PROCESS, str(tests), str(folder)], check=True, capture_output=True)
    for found, model in zip(torch.load(folder / "outputs.pt"), (tokens, head), strict=True):
        torch.testing.assert_close(found, outputs(model), rtol=0, atol=1e-6)


def test_pefts_own_class_adds_the_tokens(trained):
    folder, tokens, _ = trained
    torch.manual_seed(5)
    loaded = AutoPeftModelForCausalLM.from_pretrained(folder / "tokens")
    torch.testing.assert_close(outputs(loaded), outputs(tokens), rtol=0, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("more", [1, 300])
def test_the_fingerprint_is_that_of_what_the_checkpoint_holds(more, tied, tmp_path):
    tiny_model("llama", vocab_size=VOCABULARY, tie_word_embeddings=tied).save_pretrained(tmp_path)
    expected = scan(tmp_path, progress=False).base
    base = AutoModelForCausalLM.from_pretrained(tmp_path)
    base.resize_token_embeddings(VOCABULARY + more)
    assert scan(base, progress=False).base == expected
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.1.mlp.up_proj.weight"):
        changed = copy.deepcopy(base)
        with torch.no_grad():
            changed.get_parameter(name)[0, 0] += 1
        assert scan(changed, progress=False).base != expected, name


def test_the_fingerprint_of_a_task_is_that_of_its_base(tmp_path):
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    task = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    assert scan(task, progress=False).base == scan(tmp_path, progress=False).base


@pytest.mark.parametrize("include", [["head"], ["embedding"]])
def test_a_new_matrix_that_is_trained_is_replaced_whole(include, trained, tmp_path):
    folder = trained[0]
    model = get_peft_model(with_new_tokens(folder), KappaTuneConfig(k=1, include=include, exclude=["norm"]))
    train(model, input_ids=IDS, labels=IDS)
    model.save_pretrained(tmp_path)
    torch.manual_seed(9)
    loaded = PeftModel.from_pretrained(with_new_tokens(folder), tmp_path)
    torch.testing.assert_close(outputs(loaded), outputs(model), rtol=0, atol=1e-6)


def test_an_adapter_of_another_base_is_still_refused(trained, tmp_path):
    tiny_model("llama", vocab_size=VOCABULARY, seed=3).save_pretrained(tmp_path)
    other = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    with pytest.raises(KappaTuneError, match="fingerprint"):
        PeftModel.from_pretrained(other, trained[0] / "head")


@pytest.mark.skipif(Version(transformers.__version__) < Version("5"), reason="4 doesn't mark what it loaded")
def test_random_matrices_that_nothing_saves_are_said(tmp_path, recwarn):
    tiny_model("bert").save_pretrained(tmp_path)

    def base() -> nn.Module:
        return AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)

    with pytest.warns(
        UserWarning, match=re.escape("bert.pooler.dense.weight") + ".*" + re.escape("[bert.pooler.dense]")
    ):
        get_peft_model(base(), KappaTuneConfig(k=2, task_type="SEQ_CLS"))
    recwarn.clear()
    get_peft_model(base(), KappaTuneConfig(k=2, task_type="SEQ_CLS", modules_to_save=["bert.pooler.dense"]))
    get_peft_model(base(), KappaTuneConfig(k="100%", task_type="SEQ_CLS"))
    get_peft_model(tiny_model("llama"), KappaTuneConfig(k=2))
    assert not [str(each.message) for each in recwarn if "in the checkpoint" in str(each.message)]
