"""The PEFT method: `get_peft_model(model, KappaTuneConfig(k=75))`.

Everything that relies on the inside of PEFT is here, in layer.py, values.py and register.py.
"""

import copy
from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import DUMMY_TARGET_MODULES, BaseTuner
from torch import nn
from torch.utils.hooks import RemovableHandle

from kappatune_plugin.distributed import shards
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.selection.report import KappaReport
from kappatune_plugin.selection.selection import Selection
from kappatune_plugin.slices.backward_end import end_backward_early
from kappatune_plugin.slices.bind import BINDINGS, parameter_readers, shadow, unshadow
from kappatune_plugin.tuner.config import LORA, KappaTuneConfig
from kappatune_plugin.tuner.dequantized_layer import attach, dequantize_linear, detach
from kappatune_plugin.tuner.layer import (
    MIXED_BATCH,
    NOT_WRITTEN,
    KappaTuneLayer,
    check_finite,
    check_reached,
    child_name,
    warn_not_finite,
)
from kappatune_plugin.tuner.lowrank import check_pairs
from kappatune_plugin.tuner.register import PREFIX, register
from kappatune_plugin.tuner.saved_selection import check_loaded_keys, check_selection, keep_selection, named_as_here
from kappatune_plugin.tuner.trainer_hooks import follow, in_step
from kappatune_plugin.tuner.values import VALUES
from kappatune_plugin.tuner.what_to_train import (
    keep_statistics,
    note_base,
    settle,
    settle_modules_to_save,
    warn_of_new_weights,
)
from kappatune_plugin.weights.fused_experts import make_dense
from kappatune_plugin.weights.model_source import ModelSource
from kappatune_plugin.weights.quantized import keep_unpacked
from kappatune_plugin.weights.units import WeightUnit, embedding_modules, place_of

SAVE_AGAIN = "`PeftModel.from_pretrained(base, folder).save_pretrained(new_folder)` and load that."


class KappaTuneModel(BaseTuner):
    """Trains the selected units of a model in place.

    Attributes:
        selections: adapter name -> what it trains and why.
        reports: adapter name -> the kappa report its selection was made from; None if a selection was given.
    """

    prefix = PREFIX
    tuner_layer_cls = KappaTuneLayer
    target_module_mapping: dict[str, list[str]] = {}
    # whether DeepSpeed made a step whose values didn't reach the base yet
    _late = False
    # adapters on a quantized base whose values are float32
    _float32: Set[str] = frozenset()

    selections: dict[str, Selection]
    reports: dict[str, KappaReport | None]

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Settle what `adapter_name` trains, then let PEFT attach it.

        Raises:
            KappaTuneError: the selection is empty, was made on another base, or can't be attached whole.
        """
        source = ModelSource(model)
        if "selections" not in self.__dict__:
            self.selections, self.reports, self._base_hashes = {}, {}, source.base_hashes()
            self.register_load_state_dict_pre_hook(check_loaded_keys)
            self.register_state_dict_pre_hook(warn_not_finite)
            self._running: list[tuple[list[tuple[nn.Module, str]], list[RemovableHandle]]] = []
            self._hooks = [
                model.register_forward_pre_hook(self._before_forward),
                model.register_forward_hook(self._after_forward, always_call=True),
            ]
        # a config may be used for several models: what it settles to here is this model's
        config = self.peft_config[adapter_name] = copy.deepcopy(self.peft_config[adapter_name])
        settle_modules_to_save(config, model)
        selection, units = self._settle(source, adapter_name, config)
        warn_of_new_weights(config, source, units)
        note_base(config, model)
        keep_unpacked(model)
        dequantize_linear(model, units)
        if config.adapter == LORA:
            check_pairs(model, units, config)
        self._targets: dict[str, list[WeightUnit]] = {}
        for unit in units:
            self._targets.setdefault(place_of(unit.parameter)[0], []).append(unit)
        config.target_modules = None if units else DUMMY_TARGET_MODULES  # else PEFT refuses to attach nothing
        self._readers = parameter_readers(model)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        del self._readers
        attached = {layer.unit.name for layer in self.layers() if adapter_name in layer.kappatune_values}
        if missing := {unit.name for unit in units} - attached:
            raise KappaTuneError(f"Can't train {sorted(missing)}: PEFT doesn't reach parameters of the model itself.")
        self.selections[adapter_name] = selection
        follow(self)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward, with the hooks that PEFT 0.18 goes past."""
        return self.model(*args, **kwargs)

    def train(self, mode: bool = True) -> "KappaTuneModel":
        """As torch's, but for frozen batch norms: see `keep_statistics`."""
        super().train(mode)
        keep_statistics(self.model)
        return self

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Iterator[None]:
        """PEFT's hook around each forward and generation, where it hands `adapter_names` on."""
        if adapter_names is not None:
            raise KappaTuneError(MIXED_BATCH)
        yield

    def _before_forward(self, model: nn.Module, args: Any) -> None:
        """The output head is bound around the model's forward, since TRL reads its weight from outside.

        On the model itself: without a `task_type` PEFT calls it past the tuner.
        """
        if self._late and torch.is_grad_enabled():
            raise KappaTuneError(f"What is trained {NOT_WRITTEN}")
        if in_step():
            self.write_through(everything=True)
        head = embedding_modules(model)[1]
        selected = head is not None and BINDINGS in head.__dict__
        if selected:
            _check_head(head)
        ends = [] if torch.compiler.is_compiling() else end_backward_early(model)
        self._running.append((shadow(head) if selected else [], ends))

    def _after_forward(self, model: nn.Module, args: Any, output: Any) -> None:
        # called after an error of `_before_forward` too
        if self._running:
            shadowed, ends = self._running.pop()
            unshadow(shadowed)
            for handle in ends:
                handle.remove()

    def layers(self) -> list[KappaTuneLayer]:
        """The trained units of all adapters, in the model's order."""
        return [module for module in self.model.modules() if isinstance(module, KappaTuneLayer)]

    def write_through(self, everything: bool = False) -> None:
        """Write the trained values into the base model: those that moved since the last time, or all of them.

        Collective where weights are divided over ranks.
        """
        # DeepSpeed's steps leave no trace in a tensor's version
        everything, self._late = everything or self._late, False
        for layer in self._layers_cached():
            if everything or layer.moved:
                layer.write()

    def check_checkpoint(self, folder: str) -> None:
        """Refuse a Trainer's checkpoint of another selection. Raises KappaTuneError."""
        for adapter in self.active_adapters:
            check_selection(Path(folder), (unit.name for unit in self.selections[adapter].units))

    def keep_selection(self, folder: str) -> None:
        """Have a Trainer's checkpoint say what it trains, if it holds no adapter that does."""
        for adapter in self.active_adapters:
            keep_selection(Path(folder), self.selections[adapter])

    def keep_float32(self) -> None:
        """Undo the cast to bfloat16 that TRL makes of all that is trained on a quantized base.

        It is meant for LoRA's matrices, which begin at zero. Most updates of a weight are below bfloat16's resolution.
        """
        for layer in self.layers():
            for name in self._float32 & set(layer.kappatune_values):
                for leaf in layer.kappatune_values[name].leaves:
                    leaf.data = leaf.data.float()
        if self._float32:
            self.write_through(everything=True)

    def rest_after(self, count: int, adapter_name: str = "default") -> None:
        """Train the first `count` units of the selection; the others rest where they are (see `KappaTuneLayer`)."""
        trained = {unit.name for unit in self.selections[adapter_name].units[:count]}
        for layer in self.layers():
            if adapter_name in layer.kappatune_values:
                layer.resting = layer.unit.name not in trained

    def keep_first(self, count: int, adapter_name: str = "default") -> None:
        """Reduce the adapter to the first `count` units of its selection; the others have the base's values again."""
        selection = self.selections[adapter_name]
        kept = {unit.name for unit in selection.units[:count]}
        for layer in self.layers():
            if adapter_name in layer.kappatune_values and layer.unit.name not in kept:
                layer.delete_adapter(adapter_name)
        self._detach([layer for layer in self.layers() if not layer.kappatune_values])
        selection = self.selections[adapter_name] = replace(selection, units=selection.units[:count], k=count)
        config = self.peft_config[adapter_name]
        config.k, config.selection = selection.k, selection.to_dict()

    def stepping(self, held: Set[int] | None = None) -> None:
        """Called before a step of an optimizer: each unit that it is to move has had a gradient.

        Args:
            held: the `id` of each tensor that the optimizer holds; None for all that is trained.

        Raises:
            KappaTuneError: see `layer.check_reached`.
        """
        layers = [layer for layer in self._layers_cached() if layer.leaves and not layer.disable_adapters]
        check_reached([layer for layer in layers if held is None or layer.held_by(held)])

    def stepped(self, held: Set[int]) -> None:
        """Called after a step of any optimizer: write what it moved, unless that is not there yet.

        Args:
            held: the `id` of each tensor that the optimizer holds.
        """
        layers = [layer for layer in self._layers_cached() if layer.leaves]
        if any(shards.is_stepped_elsewhere(leaf) for layer in layers for leaf in layer.leaves):
            self._late = True
            return
        for layer in layers:
            if layer.held_by(held) or layer.moved:
                layer.write()

    def take_over(self, missing: Set[str]) -> None:
        """Write values that transformers' loader has put in place into the base model.

        Args:
            missing: names of parameters that it found no values for.

        Raises:
            KappaTuneError: values of ours are among them, or were trained on another base.
        """
        if any(f".{VALUES}." in name for name in missing):
            raise KappaTuneError(
                f"An earlier version saved the adapter, under names that transformers can't load. Write {SAVE_AGAIN}"
            )
        for layer in self.layers():
            layer.take_over()

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As PEFT's, but `safe_merge` refuses before anything is merged.

        A unit that was merged before another one was refused would silently not be trained any more.
        """
        if safe_merge:
            check_finite(self.layers(), adapter_names)
        super().merge_adapter(adapter_names)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; units that no other adapter trains are as they were before."""
        others = [name for name in self.peft_config if name != adapter_name]
        if adapter_name in self.active_adapters and others:
            self.set_adapter(others[0])
        active = self.active_adapters
        super().delete_adapter(adapter_name)
        self._detach([layer for layer in self.layers() if not layer.kappatune_values])
        self.active_adapter = [name for name in active if name != adapter_name]
        del self.selections[adapter_name], self.reports[adapter_name]

    def _settle(
        self, source: ModelSource, adapter_name: str, config: KappaTuneConfig
    ) -> tuple[Selection, list[WeightUnit]]:
        """Decide what `config` trains, from its selection, its report, or a scan of the base model."""
        found = settle(config, source, self._base_hashes, self._as_loaded())
        self.reports[adapter_name], selection = found.report, found.selection
        config.k, config.order, config.rank_by = selection.k, selection.order, selection.rank_by
        config.report, config.selection = None, selection.to_dict()
        return selection, found.units

    @contextmanager
    def _as_loaded(self) -> Iterator[None]:
        """The base has its own values, whatever adapters are active, for the time of the context."""
        active = self.layers()
        for layer in active:
            layer.write_original()
        try:
            yield
        finally:
            for layer in active:
                layer.write()

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, *, model: nn.Module, state_dict: dict[str, Any], **given: Any
    ) -> dict[str, Any]:
        # PEFT 0.21 and later; before, it adds the adapter's name to whatever has the prefix
        named = named_as_here(state_dict, model)
        return super()._remap_adapter_state_dict_for_load(model=model, state_dict=named, **given)

    def _check_target_module_exists(self, peft_config: KappaTuneConfig, key: str) -> bool:
        return key in self._targets

    def _prepare_adapter_config(self, peft_config: KappaTuneConfig, model_config: dict) -> KappaTuneConfig:
        return peft_config

    def _create_and_replace(
        self,
        peft_config: KappaTuneConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        for unit in self._targets[current_key]:
            name = child_name(unit)
            if name not in target._modules:
                attach(target, name, unit, self._readers)
            target._modules[name].add(adapter_name, peft_config)
        self.__dict__.pop("_layers", None)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)
        if autocast_adapter_dtype and self.peft_config[adapter_name].base_quantization:
            self._float32 = {*self._float32, adapter_name}
        # the values are new tensors now: take note of their version
        self.write_through(everything=True)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge and safe_merge:
            check_finite(self.layers(), adapter_names)
        for layer in self.layers():
            if merge:
                layer.merge(adapter_names=adapter_names)
            else:
                layer.write_original()
        for layer in self.layers() if merge else ():
            # packed values can't hold what was trained
            make_dense(layer.owner)
        self._detach(self.layers())
        for hook in self._hooks:
            hook.remove()
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # only PEFT's own wrappers are replaced here, and what they unwrap to is complete
        setattr(parent, child_name, new_module)

    def _detach(self, layers: list[KappaTuneLayer]) -> None:
        detach(self.model, layers)
        self.__dict__.pop("_layers", None)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        follow(self)

    def _layers_cached(self) -> list[KappaTuneLayer]:
        # walking all modules of a large model after each step takes longer than the writing
        if "_layers" not in self.__dict__:
            self.__dict__["_layers"] = self.layers()
        return self.__dict__["_layers"]


def _check_head(head: nn.Module) -> None:
    """TRL reads the output head's weight from outside the head, where ZeRO-3 and FSDP2 don't gather it."""
    if any(shards.is_partitioned(value) for value in head._parameters.values()):
        raise KappaTuneError(
            "The output head is selected and divided over ranks (ZeRO-3 or FSDP2), where it can't be trained. Exclude "
            "it (`exclude: [norm, bias, embedding, head]`, the default), or use ZeRO-2."
        )


register(KappaTuneConfig, KappaTuneModel)
