"""The launcher for LLaMA-Factory without LLaMA-Factory.

A package of a few lines stands in for it, with just the globals that the launcher relies on where 0.9.5 has them: it
shows that each is looked at before it is replaced. tests/toolkits/run.sh llamafactory runs the real thing.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import get_peft_model
from transformers import HfArgumentParser
from typer.testing import CliRunner

from helpers.tiny import tiny_model
from kappatune_plugin import KappaTuneConfig, KappaTuneError
from kappatune_plugin.cli.app import app
from kappatune_plugin.toolkits import llamafactory
from kappatune_plugin.tuner.config import KAPPATUNE_KEYS

PARSE = """
from llamafactory.hparams.finetuning_args import FinetuningArguments
from llamafactory.hparams.model_args import ModelArguments

_TRAIN_ARGS = [ModelArguments, FinetuningArguments]
_INFER_ARGS = [ModelArguments, FinetuningArguments]
_EVAL_ARGS = [FinetuningArguments]

def _parse_train_args():
    return _TRAIN_ARGS

def _parse_infer_args():
    return _INFER_ARGS

def _parse_eval_args():
    return _EVAL_ARGS
"""
METHODS = """
from dataclasses import dataclass, field
from typing import Literal

@dataclass
class LoraArguments:
    lora_rank: int = 8
    lora_target: str = "all"
    additional_target: str | None = None
    create_new_adapter: bool = False

@dataclass
class FinetuningArguments(LoraArguments):
    pure_bf16: bool = False
    use_llama_pro: bool = False
    finetuning_type: Literal["lora", "full"] = field(default="lora", metadata={"help": "Which method."})

    def __post_init__(self):
        self.lora_target = self.lora_target.split(",")
        self.additional_target = self.additional_target and self.additional_target.split(",")
        assert self.finetuning_type in ["lora", "full"]
"""
MODEL = """
from dataclasses import dataclass

@dataclass
class ModelArguments:
    adapter_name_or_path: str | None = None
    resize_vocab: bool = False
    use_unsloth: bool = False
    use_kt: bool = False
"""
LOADER = """
def init_adapter(config, model, model_args, finetuning_args, is_trainable):
    return "theirs"

def load_model(*arguments):
    return init_adapter(*arguments)
"""
LAUNCHER = """
import sys

def launch():
    print("launched", sys.argv, __file__)
"""
FILES = {
    "__init__.py": "__version__ = '0.9.5'",
    "launcher.py": LAUNCHER,
    "hparams/__init__.py": "",
    "hparams/parser.py": PARSE,
    "hparams/finetuning_args.py": METHODS,
    "hparams/model_args.py": MODEL,
    "model/__init__.py": "",
    "model/loader.py": LOADER,
}


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """Makes the package, with `changes` {file: (old, new)}, importable; its modules as attributes of what it gives."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "llamafactory"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(transformers.trainer, "DEFAULT_CALLBACKS", list(transformers.trainer.DEFAULT_CALLBACKS))
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.syspath_prepend(tmp_path)

    def install(**changes: tuple[str, str]) -> SimpleNamespace:
        for name, text in FILES.items():
            old, new = changes.get(Path(name).stem, ("", ""))
            assert old in text
            path = tmp_path / "llamafactory" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text.replace(old, new) if old else text)
        launcher = llamafactory.install()
        from llamafactory.hparams import parser
        from llamafactory.model import loader

        return SimpleNamespace(launcher=launcher, parser=parser, loader=loader)

    yield install
    for name in [name for name in sys.modules if name.partition(".")[0] == "llamafactory"]:
        del sys.modules[name]


def parse(package: SimpleNamespace, **values: object) -> list:
    return HfArgumentParser(package.parser._TRAIN_ARGS).parse_dict(values)


def attach(package: SimpleNamespace, is_trainable: bool = True, **values: object):
    model_args, finetuning_args = parse(package, **values)
    if model_args.adapter_name_or_path:
        model_args.adapter_name_or_path = model_args.adapter_name_or_path.split(",")
    model = tiny_model("llama")
    return package.loader.load_model(model.config, model, model_args, finetuning_args, is_trainable)


def trainable(model: torch.nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def test_keys_of_a_recipe_under_a_prefix(installed):
    names = [f"kappatune_{key}" for key in KAPPATUNE_KEYS]
    for classes in (installed().parser._TRAIN_ARGS, installed().parser._INFER_ARGS, installed().parser._EVAL_ARGS):
        assert [name for name in classes[-1].__dataclass_fields__ if name.startswith("kappatune_")] == names


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"kappatune_k": 5}, {"k": 5}),
        ({"kappatune_k": "10%", "kappatune_exclude": ["norm"]}, {"k": "10%", "exclude": ["norm"]}),
        ({"kappatune_k": {"params": "2k"}, "kappatune_seed": 1}, {"k": {"params": "2k"}, "seed": 1}),
        ({"additional_target": "embed_tokens,lm_head"}, {"modules_to_save": ["embed_tokens", "lm_head"]}),
        ({"kappatune_adapter": "lora", "kappatune_r": 4}, {"adapter": "lora", "r": 4}),
        ({"kappatune_match": {"params": "2k"}}, {"match": {"params": "2k"}}),
        ({"kappatune_match": "lora_r8_all_linear"}, {"match": "lora_r8_all_linear"}),
        ({}, {}),
    ],
)
def test_settings_from_yaml(installed, given, found):
    _, arguments = parse(installed(), finetuning_type="kappatune", **given)
    assert (arguments.finetuning_type, arguments.kappatune) == ("lora", found)


def test_settings_from_the_command_line(installed):
    line = ["--finetuning_type", "kappatune", "--kappatune_k", "5", "--kappatune_include", "*.q_proj.weight"]
    _, arguments = HfArgumentParser(installed().parser._TRAIN_ARGS).parse_args_into_dataclasses(line)
    assert arguments.kappatune == {"k": 5, "include": ["*.q_proj.weight"]}
    with pytest.raises(KappaTuneError, match="lora_rank: another"):
        HfArgumentParser(installed().parser._TRAIN_ARGS).parse_args_into_dataclasses([*line, "--lora_rank", "4"])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"kappatune_k": 0}, "kappatune_k"),
        ({"kappatune_order": "lowst"}, "kappatune_order: 'lowst' is none of"),
        # LLaMA-Factory's defaults, but written
        ({"lora_rank": 8, "lora_target": "all"}, "lora_rank, lora_target: another method's"),
        ({"use_llama_pro": True}, "use_llama_pro: another method's"),
        ({"additional_target": "lm_head", "kappatune_modules_to_save": ["lm_head"]}, "say the same"),
        ({"finetuning_type": "lora", "kappatune_k": 5}, "kappatune_k: ignored with finetuning_type: lora"),
    ],
)
def test_conflicts(installed, given, words):
    with pytest.raises(KappaTuneError, match=words):
        parse(installed(), **{"finetuning_type": "kappatune", **given})


def test_misspelt_keys_are_unknown(installed):
    with pytest.raises(ValueError, match="kappatune_odrer"):
        parse(installed(), finetuning_type="kappatune", kappatune_odrer="lowest")


def test_other_methods_are_left_alone(installed):
    package = installed()
    _, arguments = parse(package, finetuning_type="full")
    assert (arguments.finetuning_type, arguments.kappatune) == ("full", None)
    assert attach(package, finetuning_type="lora", lora_rank=4) == "theirs"


def test_trains_exactly_the_selected(installed):
    model = attach(installed(), finetuning_type="kappatune", kappatune_k=5)
    assert len(trainable(model)) == len([name for name in trainable(model) if "kappatune_values" in name]) == 5
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_trained_adapters_are_loaded_by_llamafactory(installed, tmp_path):
    get_peft_model(tiny_model("llama"), KappaTuneConfig(k=5)).save_pretrained(tmp_path / "a")
    package, values = installed(), {"finetuning_type": "kappatune", "adapter_name_or_path": str(tmp_path / "a")}
    assert attach(package, **values) == "theirs"
    assert attach(package, **values, is_trainable=False) == "theirs"
    with pytest.raises(KappaTuneError, match="k is 5 there, 4 here"):
        attach(package, **values, kappatune_k=4)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"use_unsloth": True, "use_kt": True}, "use_unsloth: not supported.*\nuse_kt: not supported"),
        ({"resize_vocab": True}, r"add kappatune_modules_to_save: \[embed_tokens, lm_head\]"),
        ({"is_trainable": False}, "no trained adapter to run: add adapter_name_or_path"),
        ({"adapter_name_or_path": "nowhere"}, "Can't read an adapter from 'nowhere'"),
    ],
)
def test_what_does_not_go_with_it(installed, given, words):
    with pytest.raises(KappaTuneError, match=words):
        attach(installed(), finetuning_type="kappatune", **given)


def test_towers_are_not_trained_by_the_way(installed):
    package, model = installed(), tiny_model("llama")
    model.config.vision_config = object()
    for given, refused in (({}, True), ({"kappatune_include": ["*.q_proj.weight"]}, False)):
        arguments = parse(package, finetuning_type="kappatune", kappatune_k=2, **given)
        if refused:
            with pytest.raises(KappaTuneError, match=r"kappatune_include: \['\*language_model\*'\]"):
                package.loader.load_model(model.config, model, *arguments, True)
        else:
            assert len(trainable(package.loader.load_model(model.config, model, *arguments, True))) == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"parser": ("return _TRAIN_ARGS", "return [FinetuningArguments]")}, "hparams.parser._TRAIN_ARGS"),
        ({"parser": ("_EVAL_ARGS = [FinetuningArguments]", "_EVAL_ARGS = []")}, "hparams.parser._EVAL_ARGS"),
        ({"loader": ("is_trainable", "trainable")}, "model.loader.init_adapter doesn't attach"),
        ({"loader": ("return init_adapter", "return list")}, "model.loader.init_adapter doesn't attach"),
        ({"loader": ("def init_adapter", "def initialize")}, "model.loader.init_adapter doesn't attach"),
        ({"launcher": ("__file__", "0")}, "launcher.__file__ isn't what torchrun starts"),
        ({"finetuning_args": ("pure_bf16", "half")}, "FinetuningArguments has no pure_bf16"),
        ({"model_args": ("resize_vocab", "resize")}, "ModelArguments has no resize_vocab"),
    ],
)
def test_another_llamafactory_is_refused(installed, changes, words):
    with pytest.raises(KappaTuneError, match="0.9.5 differs from 0.9.5") as error:
        installed(**changes)
    assert words in str(error.value)


def test_installing_twice_changes_nothing(installed):
    first = installed()
    before = (first.loader.init_adapter, first.parser._TRAIN_ARGS[-1], len(transformers.trainer.DEFAULT_CALLBACKS))
    llamafactory.install()
    after = (first.loader.init_adapter, first.parser._TRAIN_ARGS[-1], len(transformers.trainer.DEFAULT_CALLBACKS))
    assert after == before


def test_the_command_launches(installed, capsys):
    installed()
    llamafactory.main(["train", "x.yaml", "kappatune_k=4"])
    launched = (
        "launched ['llamafactory-cli', 'train', 'x.yaml', 'kappatune_k=4'] -m kappatune_plugin.toolkits.llamafactory"
    )
    assert capsys.readouterr().out.strip() == launched


def test_without_llamafactory_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "llamafactory", None)
    result = CliRunner().invoke(app, ["llamafactory", "train", "x.yaml"])
    assert result.exit_code == 2
    assert "pip install llamafactory==0.9.5" in result.output


def test_its_other_trainers_are_refused(monkeypatch):
    monkeypatch.setenv("USE_V1", "1")
    with pytest.raises(KappaTuneError, match="USE_V1 is set"):
        llamafactory.main(["train", "x.yaml"])
