"""The keys with which recipes of TRL, Axolotl and LLaMA-Factory ask for LoRA, and why a conversion removes each."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kappatune_plugin.errors import KappaTuneError

SIZE = "the size of LoRA's matrices: k says how much is trained"
SCALE = "the scale of LoRA's product: KappaTune trains the weights themselves, nothing is scaled"
DROPOUT = "the dropout before LoRA's matrices: KappaTune adds no matrices to drop from"
WHERE = "where LoRA sits: KappaTune ranks all matrices of the model"
DORA = "the magnitudes that DoRA trains beside LoRA: a weight that is trained itself changes its magnitudes anyway"
QUANTIZED = "Axolotl quantizes only for its own adapters"
SAVED = "carried over to modules_to_save"
TRAINED = "a LoRA trained earlier: merge it into the base, and start from that"
INIT = "how LoRA's matrices start: KappaTune starts at the base weights"
RATES = "learning rates of LoRA's two matrices, which KappaTune doesn't have"
UNSLOTH = "Unsloth's kernels are written for LoRA"
KERNELS = "kernels for LoRA's product"
OTHER = "it belongs to LoRA"


@dataclass(frozen=True)
class Toolkit:
    """How one toolkit's YAML asks for LoRA.

    Attributes:
        name: its name for `kappatune convert --toolkit`.
        title: its name for people.
        command: the command that trains a converted recipe, without the path.
        model: the key that names the base model.
        marks: keys by which this toolkit's files are recognized.
        switch: the key that turns LoRA on.
        gone: why it is removed -> keys.
        refusal: content -> why it isn't a LoRA recipe; "" if it is one.
        options: content -> the keywords of the peft.LoraConfig.
        prefixes: other keys with these prefixes are removed too.
        kept: keys with such a prefix that mean the same for KappaTune.
        saved: the key of modules trained whole, which becomes KappaTune's; None if it stays.
    """

    name: str
    title: str
    command: str
    model: str
    marks: tuple[str, ...]
    switch: str
    gone: dict[str, list[str]]
    refusal: Callable[[Mapping[str, Any]], str]
    options: Callable[[Mapping[str, Any]], dict[str, Any]]
    prefixes: tuple[str, ...] = ("lora_",)
    kept: tuple[str, ...] = ()
    saved: str | None = None

    def reason(self, key: str) -> str | None:
        """Why `key` is removed; None if it stays."""
        if key in self.kept:
            return None
        named = (reason for reason, keys in self.gone.items() if key in keys)
        return next(named, OTHER if key.startswith(self.prefixes) else None)

    def saved_modules(self, content: Mapping[str, Any]) -> list[str]:
        """The modules that are trained whole beside LoRA."""
        return names(content.get(self.saved)) if self.saved else []


def names(value: Any) -> list[str]:
    """A list, or a string of comma-separated names, as a list."""
    if isinstance(value, str):
        return [name.strip() for name in value.split(",") if name.strip()]
    return list(value or [])


def _targets(value: Any) -> str | list[str] | None:
    found = names(value)
    return found[0] if found in (["all-linear"], ["all"]) else found or None


def _trl_refusal(content: Mapping[str, Any]) -> str:
    return "" if content.get("use_peft") else "use_peft isn't true, so `trl sft` trains every weight with it"


def _trl_options(content: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "r": content.get("lora_r", 16),
        "target_modules": _targets(content.get("lora_target_modules")),
        "target_parameters": names(content.get("lora_target_parameters")) or None,
        "use_dora": bool(content.get("use_dora")),
    }


def _axolotl_refusal(content: Mapping[str, Any]) -> str:
    found = content.get("adapter")
    return "" if found in ("lora", "qlora") else f"its adapter is {found!r}, expected lora or qlora"


def _axolotl_options(content: Mapping[str, Any]) -> dict[str, Any]:
    targets = _targets(content.get("lora_target_modules"))
    return {
        "r": content.get("lora_r", 8),
        "target_modules": "all-linear" if content.get("lora_target_linear") else targets,
        "target_parameters": names(content.get("lora_target_parameters")) or None,
        "layers_to_transform": content.get("peft_layers_to_transform"),
        "rank_pattern": content.get("lora_rank_pattern") or {},
        "use_dora": bool(content.get("peft_use_dora")),
    }


def _llamafactory_refusal(content: Mapping[str, Any]) -> str:
    found = content.get("finetuning_type", "lora")
    if found != "lora":
        return f"its finetuning_type is {found!r}, expected lora"
    if not content.get("do_train") and not content.get("stage"):
        return "it has neither stage nor do_train, so it trains nothing; to export a trained model: kappatune merge"
    return ""


def _llamafactory_options(content: Mapping[str, Any]) -> dict[str, Any]:
    targets = _targets(content.get("lora_target", "all"))
    return {
        "r": content.get("lora_rank", 8),
        "target_modules": "all-linear" if targets == "all" else targets,
        "use_dora": bool(content.get("use_dora")),
    }


TRL = Toolkit(
    name="trl",
    title="TRL",
    command="kappatune sft --config",
    model="model_name_or_path",
    marks=("use_peft", "lora_r", "lora_target_modules", "dataset_name", "dataset_config", "model_revision"),
    switch="use_peft",
    gone={
        SIZE: ["lora_r"],
        SCALE: ["lora_alpha", "use_rslora"],
        DROPOUT: ["lora_dropout"],
        WHERE: ["lora_target_modules", "lora_target_parameters"],
        SAVED: ["lora_modules_to_save"],
        DORA: ["use_dora"],
    },
    refusal=_trl_refusal,
    options=_trl_options,
    saved="lora_modules_to_save",
)
AXOLOTL = Toolkit(
    name="axolotl",
    title="Axolotl",
    command="axolotl train",
    model="base_model",
    marks=("base_model", "adapter", "micro_batch_size", "sequence_len", "val_set_size", "dataset_prepared_path"),
    switch="adapter",
    gone={
        SIZE: ["lora_r", "lora_rank_pattern"],
        SCALE: ["lora_alpha", "lora_alpha_pattern", "peft_use_rslora"],
        DROPOUT: ["lora_dropout"],
        WHERE: [
            *("lora_target_linear", "lora_target_modules", "lora_target_parameters", "lora_fan_in_fan_out"),
            *("peft_layers_to_transform", "peft_layers_pattern", "peft_layer_replication"),
        ],
        DORA: ["peft_use_dora"],
        QUANTIZED: [
            *("load_in_4bit", "load_in_8bit", "gptq", "bnb_config_kwargs", "quantize_moe_experts"),
            "qlora_sharded_model_loading",
        ],
        TRAINED: ["lora_model_dir"],
        INIT: ["peft", "peft_init_lora_weights"],
        RATES: ["loraplus_lr_ratio", "loraplus_lr_embedding"],
        KERNELS: ["lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel"],
        UNSLOTH: ["unsloth_lora_mlp", "unsloth_lora_qkv", "unsloth_lora_o"],
    },
    refusal=_axolotl_refusal,
    options=_axolotl_options,
    prefixes=("lora_", "peft_", "qlora_", "relora", "unsloth_"),
    # Axolotl itself requires lora_modules_to_save when tokens are added
    kept=("lora_on_cpu", "peft_autocast_adapter_dtype", "lora_modules_to_save"),
)
LLAMAFACTORY = Toolkit(
    name="llamafactory",
    title="LLaMA-Factory",
    command="kappatune llamafactory train",
    model="model_name_or_path",
    marks=("stage", "finetuning_type", "template", "cutoff_len", "lora_rank", "lora_target", "dataset_dir", "do_train"),
    switch="finetuning_type",
    gone={
        SIZE: ["lora_rank"],
        SCALE: ["lora_alpha", "use_rslora"],
        DROPOUT: ["lora_dropout"],
        WHERE: ["lora_target"],
        SAVED: ["additional_target"],
        DORA: ["use_dora"],
        TRAINED: ["adapter_name_or_path", "create_new_adapter"],
        INIT: ["pissa_init", "pissa_iter", "pissa_convert"],
        RATES: ["loraplus_lr_ratio", "loraplus_lr_embedding"],
        UNSLOTH: ["use_unsloth"],
    },
    refusal=_llamafactory_refusal,
    options=_llamafactory_options,
    saved="additional_target",
)
TOOLKITS = {toolkit.name: toolkit for toolkit in (TRL, AXOLOTL, LLAMAFACTORY)}


def toolkit_of(content: Mapping[str, Any], named: str | None = None) -> Toolkit:
    """The toolkit whose recipe this is: `named`, or the one with most of its marks among the keys.

    Raises:
        KappaTuneError: an unknown name, or a file that isn't recognized.
    """
    if named is not None:
        if named not in TOOLKITS:
            raise KappaTuneError(f"--toolkit {named} is none of {', '.join(TOOLKITS)}.")
        return TOOLKITS[named]
    found = {toolkit.name: sum(mark in content for mark in toolkit.marks) for toolkit in TOOLKITS.values()}
    best = max(found, key=found.__getitem__)
    if not found[best] or list(found.values()).count(found[best]) > 1:
        raise KappaTuneError(
            f"Can't tell whose recipe this is. Write --toolkit {' or --toolkit '.join(TOOLKITS)}, and check its keys."
        )
    return TOOLKITS[best]
