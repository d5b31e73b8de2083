"""`peft.convert_to_lora` and `peft.save_as_lora` take adapters of ours.

What is changed in another library: `peft.tuners.lora.conversion.convert_to_lora` (PEFT 0.19 and later), which looks for
the changes in wrappers around layers and names what it finds by them, where ours lie beside the weights.
"""

import functools
from typing import Any

from peft import PeftModel

from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.tuner.layer import KappaTuneLayer


def follow(peft: Any) -> None:
    """Have PEFT's conversion hand models with an adapter of ours to `lora.as_lora`."""
    if not hasattr(peft, "convert_to_lora"):
        return
    conversion = peft.tuners.lora.conversion
    real = conversion.convert_to_lora

    @functools.wraps(real)
    def convert_to_lora(
        model: Any, rank: float, adapter_name: str = "default", progressbar: bool = False, compile_kwargs: Any = None
    ) -> Any:
        if not any(isinstance(module, KappaTuneLayer) for module in model.modules()):
            return real(model, rank, adapter_name, progressbar, compile_kwargs)
        if not isinstance(model, PeftModel):
            raise KappaTuneError(
                f"Got a {type(model).__name__} with a KappaTune adapter inside, expected a PeftModel: "
                "PeftModel.from_pretrained(base, ADAPTER)."
            )
        # what it needs takes long to load
        from kappatune_plugin.export.lora import as_lora

        return as_lora(model, rank, adapter_name)

    for place in (conversion, peft.tuners.lora, peft.tuners, peft):
        place.convert_to_lora = convert_to_lora
