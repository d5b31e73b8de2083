"""What Axolotl's YAML may say to KappaTune, and what it may not say beside it. Needs no Axolotl, only pydantic."""

import difflib
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field

from kappatune_plugin.toolkits.lora_recipes import AXOLOTL, QUANTIZED
from kappatune_plugin.tuner.config import KappaTuneSettings
from kappatune_plugin.version import NAME

# Axolotl starts our adapters by it too
SHARED = "lora_model_dir"
OTHER_METHODS = ("unfrozen_parameters",)


def _given(block: Any) -> dict[str, Any]:
    return {key: value for key, value in KappaTuneSettings.given(block).items() if value is not None}


class KappaTuneArgs(BaseModel):
    """What Axolotl adds to its configuration."""

    kappatune: Annotated[dict[str, Any], BeforeValidator(_given)] | None = Field(
        default=None, description="What `adapter: kappatune` trains: the block of a KappaTune recipe."
    )


def axolotl_problems(config: Mapping[str, Any]) -> list[str]:
    """What in Axolotl's raw configuration contradicts KappaTune or would be ignored, a line each."""
    near = [key for key in difflib.get_close_matches(NAME, list(config), n=3, cutoff=0.75) if key != NAME]
    problems = [f"unknown key '{key}'. Did you mean '{NAME}'?" for key in near]
    if config.get("adapter") != NAME:
        found = config.get("adapter") or "no adapter, which trains every parameter"
        problems.append(f"the plugin is listed, but the file says {found}: write `adapter: {NAME}`.")
        return problems
    if NAME not in config and not near:
        problems.append(f"the block {NAME} is missing: add the lines `{NAME}:` and `  k: 75`.")
    given = [key for key, value in config.items() if value and key != SHARED]
    quantized = [key for key in given if AXOLOTL.reason(key) == QUANTIZED]
    other = [key for key in given if key in OTHER_METHODS or AXOLOTL.reason(key) not in (None, QUANTIZED)]
    if other:
        problems.append(f"{', '.join(other)}: another method's, and ignored here. Delete these lines.")
    if quantized:
        problems.append(
            f"{', '.join(quantized)}: Axolotl quantizes only for its own adapters, and would load the model "
            "unquantized. Delete these lines, or name a base_model that bitsandbytes quantized before it was saved."
        )
    if config.get("freeze_mm_modules"):
        problems.append(
            f"freeze_mm_modules would freeze some of what was selected: name them in {NAME}.exclude instead."
        )
    block = config.get(NAME)
    twice = isinstance(block, Mapping) and block.get("modules_to_save") is not None
    if twice and config.get("lora_modules_to_save"):
        problems.append(f"lora_modules_to_save and {NAME}.modules_to_save say the same: delete one.")
    return problems
