"""KappaTune as a plugin: fine-tune only the weight matrices of lowest condition number (arXiv 2506.16289).

Importing this package registers the method `kappatune` with PEFT: now if PEFT is imported already, else as soon as it
is. What is heavy (torch, transformers, PEFT) is imported by the first use of a public name.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from wrapt import when_imported

from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.version import __version__

if TYPE_CHECKING:
    from kappatune_plugin.condition.kappa import Kappa
    from kappatune_plugin.condition.number import condition_number
    from kappatune_plugin.interpolation.interpolate import interpolate
    from kappatune_plugin.scanning.scan import scan
    from kappatune_plugin.selection.report import KappaReport
    from kappatune_plugin.selection.selection import Selection, select
    from kappatune_plugin.tuner.config import KappaTuneConfig
    from kappatune_plugin.tuner.model import KappaTuneModel
    from kappatune_plugin.tuner.plain_lora import lora_config
    from kappatune_plugin.weights.fused_experts import quantize_experts

__all__ = [
    "Kappa",
    "KappaReport",
    "KappaTuneConfig",
    "KappaTuneError",
    "KappaTuneModel",
    "Selection",
    "__version__",
    "condition_number",
    "interpolate",
    "lora_config",
    "quantize_experts",
    "scan",
    "select",
]

_WHERE = {
    "Kappa": "condition.kappa",
    "KappaReport": "selection.report",
    "KappaTuneConfig": "tuner.config",
    "KappaTuneModel": "tuner.model",
    "Selection": "selection.selection",
    "condition_number": "condition.number",
    "interpolate": "interpolation.interpolate",
    "lora_config": "tuner.plain_lora",
    "quantize_experts": "weights.fused_experts",
    "scan": "scanning.scan",
    "select": "selection.selection",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


@when_imported("peft")
def _register(peft: Any) -> None:
    # the module registers its classes
    import_module(f"{__name__}.tuner.model")
    for hooks in ("card_hooks", "lora_hooks"):
        import_module(f"{__name__}.export.{hooks}").follow(peft)


# from here, since `transformers.trainer` imports peft: what it lacks then it has when its own import has ended
@when_imported("transformers.trainer")
def _cards_of_transformers(trainer: Any) -> None:
    import_module(f"{__name__}.export.card_hooks").of_transformers(trainer)


@when_imported("trl.trainer.base_trainer")
def _cards_of_trl(base_trainer: Any) -> None:
    import_module(f"{__name__}.export.card_hooks").of_trl(base_trainer)
