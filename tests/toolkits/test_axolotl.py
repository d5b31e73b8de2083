"""The Axolotl plugin without Axolotl: what its file may say, and what the plugin hands back.

The two classes that the plugin takes from Axolotl hold no behavior it relies on, so empty ones stand in for them here;
tests/toolkits/run.sh axolotl runs the real thing.
"""

import importlib
import sys
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from peft import get_peft_model
from pydantic import ValidationError

from helpers.tiny import tiny_model
from kappatune_plugin import KappaTuneConfig, KappaTuneError
from kappatune_plugin.toolkits.axolotl_args import KappaTuneArgs, axolotl_problems

PLUGIN = "kappatune_plugin.toolkits.axolotl"
RIGHT = {"plugins": [f"{PLUGIN}.KappaTunePlugin"], "adapter": "kappatune", "kappatune": {"k": 5}}


class Cfg(dict):
    """Axolotl's configuration: keys are attributes, and what is missing is None."""

    __getattr__ = dict.get
    __setattr__ = dict.__setitem__


def fake_axolotl(monkeypatch, **names: object) -> None:
    base = ModuleType("axolotl.integrations.base")
    vars(base).update(names)
    modules = {"axolotl": ModuleType("axolotl"), "axolotl.integrations": ModuleType("axolotl.integrations")}
    for name, module in {**modules, "axolotl.integrations.base": base}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, PLUGIN, raising=False)


@pytest.fixture
def plugin(monkeypatch):
    @dataclass(frozen=True)
    class AdapterCapabilities:
        name: str
        lora_like: bool = False

    class BasePlugin:
        pass

    fake_axolotl(monkeypatch, AdapterCapabilities=AdapterCapabilities, BasePlugin=BasePlugin)
    return importlib.import_module(PLUGIN).KappaTunePlugin()


def trainable(model: torch.nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def test_block_has_the_keys_of_a_recipe():
    given = {"k": {"params": "2k"}, "order": "random", "seed": 3, "include": ["*.q_proj.weight"], "exclude": ["norm"]}
    assert KappaTuneArgs(kappatune=given).model_dump(exclude_none=True) == {"kappatune": given}
    assert KappaTuneArgs(kappatune={}).kappatune == {}


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"k": 5, "ordr": "lowest"}, "ordr"),
        ({"k": 0}, "k"),
        ({"k": "auto"}, "auto"),
        ({"order": "lowst"}, "'lowst' is none of lowest"),
        ({"seed": -1}, "seed"),
        ({"report": "a.json", "selection": "b.json"}, "report and selection"),
        (75, "kappatune"),
    ],
)
def test_wrong_blocks_are_refused(block, words):
    with pytest.raises(ValidationError, match=words):
        KappaTuneArgs(kappatune=block)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"adapter": None}, "no adapter, which trains every parameter: write `adapter: kappatune`"),
        ({"adapter": "lora"}, "says lora"),
        ({"kapatune": {"k": 5}, "kappatune": ...}, "unknown key 'kapatune'. Did you mean 'kappatune'?"),
        ({"kappa_tune": {"k": 5}, "adapter": None}, "unknown key 'kappa_tune'"),
        ({"kappatune": ...}, "the block kappatune is missing"),
        ({"unfrozen_parameters": ["lm_head"]}, "unfrozen_parameters: another method's"),
        ({"lora_r": 8, "lora_target_linear": True, "lora_mlp_kernel": True}, "lora_r, lora_target_linear, lora_mlp"),
        ({"peft_use_dora": True}, "peft_use_dora"),
        ({"peft": {"loftq_config": {}}}, "peft:"),
        ({"freeze_mm_modules": True}, "name them in kappatune.exclude"),
        ({"load_in_4bit": True}, "load_in_4bit: Axolotl quantizes only for its own adapters"),
        ({"lora_modules_to_save": ["a"], "kappatune": {"modules_to_save": ["b"]}}, "say the same"),
    ],
)
def test_conflicts(changes, words):
    config = {key: value for key, value in {**RIGHT, **changes}.items() if value is not ...}
    problems = axolotl_problems(config)
    assert len(problems) == (2 if "kappa_tune" in changes else 1)
    assert words in "\n".join(problems)


def test_all_conflicts_are_named_at_once():
    problems = axolotl_problems({"adapter": "kappatune", "lora_r": 8, "gptq": True})
    assert [problem.split(":")[0] for problem in problems] == ["the block kappatune is missing", "lora_r", "gptq"]


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"kappatune": None},
        {"lora_model_dir": "out", "lora_on_cpu": True, "lora_modules_to_save": ["embed_tokens", "lm_head"]},
        {"load_in_4bit": False, "lora_dropout": 0.0, "lora_r": None, "peft_autocast_adapter_dtype": False},
    ],
)
def test_what_means_nothing_or_the_same_is_no_conflict(extra):
    assert axolotl_problems({**RIGHT, **extra}) == []


def test_without_axolotl_the_import_fails_with_another_error(monkeypatch):
    """Axolotl prints an ImportError of a plugin and goes on."""
    fake_axolotl(monkeypatch)
    with pytest.raises(KappaTuneError, match="Axolotl 0.17 or later"):
        importlib.import_module(PLUGIN)


def test_register_refuses_and_lets_merge_lora_merge_all(plugin):
    with pytest.raises(KappaTuneError, match="lora_r: another"):
        plugin.register(Cfg(RIGHT, lora_r=8))
    cfg = Cfg(RIGHT, merge_lora=True)
    plugin.register(cfg)
    assert cfg.merge_method == "legacy"


def test_what_axolotl_asks_for(plugin):
    assert plugin.get_input_args() == "kappatune_plugin.toolkits.axolotl_args.KappaTuneArgs"
    (capabilities,) = plugin.get_adapter_capabilities()
    assert (capabilities.name, capabilities.lora_like) == ("kappatune", False)
    assert plugin.load_adapter(tiny_model("llama"), Cfg(adapter="lora")) is None


def test_a_new_adapter_trains_exactly_the_selected(plugin):
    cfg = Cfg(adapter="kappatune", kappatune={"k": 5, "order": None}, lora_modules_to_save=["lm_head"])
    model, config = plugin.load_adapter(tiny_model("llama"), cfg)
    heads = [name for name in trainable(model) if "lm_head" in name]
    assert (len(trainable(model)) - len(heads), len(heads)) == (5, 1)
    assert config.selection["k"] == 5


def test_dpo_gets_the_config_and_a_whole_model(plugin):
    """A plugin that froze the model here trained all of it: TRL's trainer starts from the model as it came."""
    model = tiny_model("llama")
    before = trainable(model)
    given, config = plugin.load_adapter(model, Cfg(adapter="kappatune", kappatune={"k": 5}), config_only=True)
    assert given is None
    assert trainable(model) == before
    assert len(trainable(get_peft_model(model, config))) == 5


def test_trained_adapters(plugin, tmp_path):
    """`inference` and `merge-lora` take what `train` left, `train` goes on from lora_model_dir."""
    cfg = Cfg(RIGHT, output_dir=str(tmp_path))
    plugin.register(Cfg(cfg, inference=True))
    with pytest.raises(KappaTuneError, match="no trained adapter in output_dir"):
        plugin.load_adapter(tiny_model("llama"), cfg)
    plugin.register(cfg)
    trained, _ = plugin.load_adapter(tiny_model("llama"), cfg)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.1 if parameter.requires_grad else 0.0)
    trained.base_model.write_through()
    trained.save_pretrained(tmp_path)
    for reason in ("inference", "merge_lora"):
        plugin.register(Cfg(cfg, **{reason: True}))
        # Axolotl's checked configuration keeps merge_lora, but not inference
        checked = Cfg(cfg, merge_lora=True) if reason == "merge_lora" else cfg
        loaded, _ = plugin.load_adapter(tiny_model("llama"), checked)
        assert trainable(loaded) == []
        assert all(torch.equal(loaded.state_dict()[name], value) for name, value in trained.state_dict().items())
    plugin.register(cfg)
    again, _ = plugin.load_adapter(tiny_model("llama"), Cfg(cfg, lora_model_dir=str(tmp_path)))
    assert trainable(again) == trainable(trained)


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"k": 4}, "k is 5 there, 4 here"),
        ({"k": 5, "order": "highest", "seed": 1}, "order is 'lowest' there, 'highest' here; seed is 0 there, 1 here"),
        ({"exclude": ["head"]}, r"exclude is None there, \['head'\] here"),
    ],
)
def test_an_adapter_of_other_settings_is_refused(plugin, tmp_path, block, words):
    get_peft_model(tiny_model("llama"), KappaTuneConfig(k=5)).save_pretrained(tmp_path)
    cfg = Cfg(adapter="kappatune", kappatune=block, lora_model_dir=str(tmp_path))
    with pytest.raises(KappaTuneError, match=words):
        plugin.load_adapter(tiny_model("llama"), cfg)


def test_how_the_selection_came_about_may_differ(plugin, tmp_path):
    """An adapter holds its selection; a folder to scan, which isn't saved with it, must not keep it from loading."""
    get_peft_model(tiny_model("llama"), KappaTuneConfig(k=5)).save_pretrained(tmp_path)
    block = {"k": 5, "scan_from": "elsewhere", "rtol": 1e-4}
    cfg = Cfg(adapter="kappatune", kappatune=block, lora_model_dir=str(tmp_path))
    loaded, _ = plugin.load_adapter(tiny_model("llama"), cfg)
    assert len(trainable(loaded)) == 5


def test_dpo_does_not_drop_an_adapter_in_silence(plugin, tmp_path):
    cfg = Cfg(adapter="kappatune", kappatune={"k": 5}, lora_model_dir=str(tmp_path), rl="dpo")
    with pytest.raises(KappaTuneError, match="rl: dpo starts a new adapter"):
        plugin.load_adapter(tiny_model("llama"), cfg, config_only=True)


def test_the_model_that_dpo_leaves_beside_the_adapter_is_taken_away(plugin, tmp_path):
    """Axolotl saves the base too, with the adapter's parts in it; what others saved stays."""
    cfg = Cfg(RIGHT, rl="dpo", output_dir=str(tmp_path))
    tuned = get_peft_model(tiny_model("llama"), KappaTuneConfig(k=5))
    tuned.save_pretrained(tmp_path)
    tuned.get_base_model().save_pretrained(tmp_path, max_shard_size="20KB")
    kept = {"README.md", "adapter_config.json", "adapter_model.safetensors", "config.json", "generation_config.json"}
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    plugin.post_train(Cfg(cfg, local_rank=1), tuned)
    plugin.post_train(Cfg(cfg, rl=None), tuned)
    assert (tmp_path / "model.safetensors.index.json").exists()
    plugin.post_train(cfg, tuned)
    assert {path.name for path in tmp_path.iterdir()} == kept
    tiny_model("llama").save_pretrained(tmp_path)
    plugin.post_train(cfg, tuned)
    assert {path.name for path in tmp_path.iterdir()} == {*kept, "model.safetensors"}


def test_adapters_of_other_methods_are_refused(plugin, tmp_path):
    from peft import LoraConfig

    get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(KappaTuneError, match="adapter of LORA"):
        plugin.load_adapter(tiny_model("llama"), Cfg(adapter="kappatune", lora_model_dir=str(tmp_path)))
