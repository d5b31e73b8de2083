"""KappaTune in LLaMA-Factory 0.9, through `kappatune llamafactory train x.yaml`. In its YAML:

    finetuning_type: kappatune
    kappatune_k: 75

LLaMA-Factory has no plugins, so its launcher runs here, with these of its globals replaced:

    hparams.parser._TRAIN_ARGS, _INFER_ARGS, _EVAL_ARGS   the dataclass of the method's keys is ours
    model.loader.init_adapter                             attaches our adapter
    launcher.__file__                                     torchrun starts this module in each worker

and one callback added to transformers' default ones. `_check` looks at each before anything is replaced.
"""

import functools
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from types import FunctionType, ModuleType
from typing import Any

from torch import nn

from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.recipe.text import FLAT
from kappatune_plugin.toolkits.llamafactory_args import arguments_class
from kappatune_plugin.toolkits.shared import WriteDecisions, checked_adapter, new_adapter
from kappatune_plugin.version import NAME

PARSERS = {"_TRAIN_ARGS": "_parse_train_args", "_INFER_ARGS": "_parse_infer_args", "_EVAL_ARGS": "_parse_eval_args"}
INIT_ADAPTER = ["config", "model", "model_args", "finetuning_args", "is_trainable"]
# -m, since torchrun would put a script's folder first in sys.path
WORKER = "-m kappatune_plugin.toolkits.llamafactory"
# switches of its other trainers, which don't use the globals replaced here
OTHER_TRAINERS = ("USE_V1", "USE_MCA", "USE_RAY", "USE_KT")


def main(arguments: Sequence[str]) -> None:
    """Run `llamafactory-cli ARGUMENTS`, with KappaTune among its methods.

    Raises:
        KappaTuneError: LLaMA-Factory is missing or differs from 0.9, or the YAML contradicts KappaTune.
    """
    launcher = install()
    sys.argv = ["llamafactory-cli", *arguments]
    launcher.launch()


def install() -> ModuleType:
    """Replace the globals listed above, once. Returns LLaMA-Factory's launcher."""
    switches = [name for name in OTHER_TRAINERS if os.environ.get(name, "0").lower() in ("1", "true", "y")]
    if switches:
        raise KappaTuneError(f"{', '.join(switches)} is set: KappaTune runs in LLaMA-Factory's own trainer. Unset it.")
    try:
        from llamafactory import launcher
        from llamafactory.hparams import parser
        from llamafactory.hparams.finetuning_args import FinetuningArguments
        from llamafactory.hparams.model_args import ModelArguments
        from llamafactory.model import loader
    except ImportError as error:
        raise KappaTuneError(f"LLaMA-Factory can't be imported ({error}): pip install llamafactory==0.9.5") from error
    from transformers import trainer

    if hasattr(getattr(loader, "init_adapter", None), "kappatune"):
        return launcher
    _check(launcher, parser, loader, FinetuningArguments, ModelArguments)
    ours = arguments_class(FinetuningArguments)
    for name in PARSERS:
        classes = getattr(parser, name)
        classes[classes.index(FinetuningArguments)] = ours
    loader.init_adapter = _init_adapter(loader.init_adapter)
    launcher.__file__ = WORKER
    trainer.DEFAULT_CALLBACKS.append(WriteDecisions)
    return launcher


def _check(launcher: Any, parser: Any, loader: Any, finetuning: type, model: type) -> None:
    """Raise KappaTuneError if anything that is replaced or read differs from the version this was written for."""
    problems = []
    for name, function in PARSERS.items():
        if getattr(parser, name, []).count(finetuning) != 1 or not _reads(parser, function, name):
            problems.append(f"hparams.parser.{name} doesn't decide which keys a YAML may have")
    parameters = list(inspect.signature(getattr(loader, "init_adapter", len)).parameters)
    if parameters != INIT_ADAPTER or not _reads(loader, "load_model", "init_adapter"):
        problems.append("model.loader.init_adapter doesn't attach the adapter")
    if not _reads(launcher, "launch", "__file__"):
        problems.append("launcher.__file__ isn't what torchrun starts")
    for owner, names in (
        (finetuning, ("finetuning_type", "pure_bf16", "create_new_adapter", "additional_target")),
        (model, ("adapter_name_or_path", "resize_vocab", "use_unsloth", "use_kt")),
    ):
        missing = [name for name in names if name not in owner.__dataclass_fields__]
        problems += [f"{owner.__name__} has no {name}" for name in missing]
    if problems:
        import llamafactory

        raise KappaTuneError(
            f"LLaMA-Factory {getattr(llamafactory, '__version__', '')} differs from 0.9.5, which KappaTune supports: "
            f"{'; '.join(problems)}. Install llamafactory==0.9.5."
        )


def _reads(module: Any, function: str, name: str) -> bool:
    """Whether `module.function` looks up the global `name` when it runs."""
    found = getattr(module, function, None)
    return isinstance(found, FunctionType) and name in found.__code__.co_names


def _init_adapter(original: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    @functools.wraps(original)
    def init_adapter(
        config: Any, model: nn.Module, model_args: Any, finetuning_args: Any, is_trainable: bool
    ) -> nn.Module:
        given = getattr(finetuning_args, "kappatune", None)
        if given is None:
            return original(config, model, model_args, finetuning_args, is_trainable)
        adapters = model_args.adapter_name_or_path
        _check_model(config, model_args, given, is_trainable)
        if adapters and not (is_trainable and finetuning_args.create_new_adapter):
            # LLaMA-Factory itself merges all but the last adapter and continues with that one
            checked_adapter(adapters[-1], given)
            return original(config, model, model_args, finetuning_args, is_trainable)
        if adapters:
            model = original(config, model, model_args, finetuning_args, False)
        return new_adapter(model, given, autocast_adapter_dtype=not finetuning_args.pure_bf16)

    init_adapter.kappatune = True
    return init_adapter


def _check_model(config: Any, model_args: Any, given: dict[str, Any], is_trainable: bool) -> None:
    """Raise KappaTuneError for settings of the model that the adapter can't be attached or trained with."""
    problems = [
        f"{name}: not supported with finetuning_type: {NAME}. Delete it."
        for name in ("use_unsloth", "use_kt")
        if getattr(model_args, name)
    ]
    if is_trainable and model_args.resize_vocab and "modules_to_save" not in given:
        problems.append(
            f"resize_vocab: the new tokens wouldn't be trained: add {FLAT}modules_to_save: [embed_tokens, lm_head]."
        )
    towers = [part for part in ("vision_config", "audio_config") if hasattr(config, part)]
    if is_trainable and towers and not {"include", "exclude", "selection"} & given.keys():
        problems.append(
            f"the model has a {towers[0]}, and freeze_vision_tower has no effect on KappaTune: write what may be "
            f"trained, such as {FLAT}include: ['*language_model*']."
        )
    if not is_trainable and not model_args.adapter_name_or_path:
        problems.append("there is no trained adapter to run: add adapter_name_or_path, the output_dir of the training.")
    if problems:
        raise KappaTuneError("\n".join(problems))


if __name__ == "__main__":
    # a worker that torchrun started
    install()
    from llamafactory.train.tuner import run_exp

    run_exp()
