"""LoRA recipes of three toolkits, in tests/toolkits/examples, turned into KappaTune ones."""

from pathlib import Path

import pytest
import yaml

from helpers.command import kappatune
from helpers.tiny import tiny_model
from kappatune_plugin import KappaTuneError
from kappatune_plugin.recipe.recipe import load_recipe
from kappatune_plugin.recipe.trl_keys import trl_keys
from kappatune_plugin.toolkits import convert
from kappatune_plugin.toolkits.convert import FORGETTING, PLUGIN, convert_recipe
from kappatune_plugin.toolkits.lora_recipes import TOOLKITS, TRL
from kappatune_plugin.toolkits.yaml_edit import YamlText

EXAMPLES = sorted((Path(__file__).parent / "examples").glob("*/*.yaml"))
HIDDEN, INTERMEDIATE, KEYS, LAYERS = 32, 48, 16, 2


@pytest.fixture(scope="module")
def configs(tmp_path_factory) -> Path:
    """The configs, without weights, of dense models and of experts, with as many layers as the examples name."""
    folder = tmp_path_factory.mktemp("configs")
    tiny_model("llama").config.save_pretrained(folder / "dense")
    tiny_model("llama", num_hidden_layers=24).config.save_pretrained(folder / "deep")
    tiny_model("gpt_oss", num_hidden_layers=16).config.save_pretrained(folder / "experts")
    return folder


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def on_disk(example: Path, configs: Path, folder: Path) -> Path:
    """A copy of the example whose model is one of `configs`."""
    toolkit = TOOLKITS[example.parent.name]
    text = example.read_text(encoding="utf-8")
    model = yaml.safe_load(text)[toolkit.model]
    local = configs / ("experts" if "oss" in model else "deep" if "mistral" in model else "dense")
    return written(folder / example.name, text.replace(model, str(local), 1))


def shown(path: Path) -> str:
    return f"{path.parent.name}-{path.stem}"


def test_there_are_five_examples_of_each_toolkit():
    assert {name: sum(path.parent.name == name for path in EXAMPLES) for name in TOOLKITS} == dict.fromkeys(TOOLKITS, 5)


@pytest.mark.parametrize("example", EXAMPLES, ids=shown)
def test_all_but_loras_keys_stay_as_they_were(example, configs, tmp_path):
    path = on_disk(example, configs, tmp_path)
    toolkit = TOOLKITS[example.parent.name]
    converted = convert_recipe(path)
    assert converted.toolkit is toolkit
    before, after = (yaml.safe_load(text) for text in (converted.before, converted.after))
    mine = {toolkit.switch, "plugins", "kappatune", "finetuning_type", "adapter"}
    stay = [key for key in before if not toolkit.reason(key) and key not in mine]
    assert [key for key in after if not key.startswith("kappatune") and key not in mine] == stay
    assert {key: after[key] for key in stay} == {key: before[key] for key in stay}
    others = [key for key in after if key not in toolkit.kept]
    assert not [key for key in others if key.startswith(("lora_", "peft_", "use_peft", "use_dora"))]
    comments = [line for line in converted.before.splitlines() if line.startswith("#")]
    added = FORGETTING.splitlines() if toolkit is TRL else []
    assert [line for line in converted.after.splitlines() if line.startswith("#") and line not in added] == comments
    assert all(line in converted.after.splitlines() for line in added)
    assert path.read_text(encoding="utf-8") == converted.before, "nothing is written"


@pytest.mark.parametrize("example", [path for path in EXAMPLES if path.parent.name == "trl"], ids=shown)
def test_trl_recipes_load(example, configs, tmp_path):
    path = on_disk(example, configs, tmp_path)
    converted = convert_recipe(path)
    recipe = load_recipe(converted.write(tmp_path / "new.yaml"))
    assert recipe.kappatune.k == converted.budget
    assert recipe.kappatune.modules_to_save == (["embed_tokens", "lm_head"] if example.stem == "dora" else None)


def test_axolotl_gets_plugin_adapter_and_block(configs, tmp_path):
    found = {}
    for path in (path for path in EXAMPLES if path.parent.name == "axolotl"):
        found[path.stem] = yaml.safe_load(convert_recipe(on_disk(path, configs, tmp_path)).after)
    assert all(each["adapter"] == "kappatune" and each["plugins"][-1] == PLUGIN for each in found.values())
    assert [len(each["plugins"]) for each in found.values()] == [1, 2, 1, 1, 2]
    assert found["dora_saved"]["kappatune"] == {
        # four layers, and DoRA's magnitudes
        "k": {"params": 4 * (8 * (2 * HIDDEN + HIDDEN + KEYS) + HIDDEN + KEYS)}
    }
    # Axolotl itself asks for it where tokens are added
    assert found["dora_saved"]["lora_modules_to_save"] == ["embed_tokens", "lm_head"]


def test_llamafactory_gets_flat_keys(configs, tmp_path):
    example = next(path for path in EXAMPLES if path.stem == "unsloth_pissa")
    after = yaml.safe_load(convert_recipe(on_disk(example, configs, tmp_path)).after)
    assert after["finetuning_type"] == "kappatune" and after["kappatune_modules_to_save"] == ["embed_tokens", "lm_head"]
    assert set(after["kappatune_k"]) == {"params"}
    # gradient checkpointing of Unsloth's that needs no Unsloth and no LoRA
    assert after["use_unsloth_gc"] is True and "use_unsloth" not in after


def lora(folder: Path, configs: Path, lines: str) -> Path:
    return written(folder / "lora.yaml", f"model_name_or_path: {configs / 'dense'}\nuse_peft: true\n{lines}")


@pytest.mark.parametrize(
    ("lines", "shapes"),
    [
        ("lora_r: 32\nlora_target_modules: [q_proj, v_proj]\n", [(HIDDEN, HIDDEN), (KEYS, HIDDEN)]),
        ("lora_r: 32\nlora_target_modules: [down_proj]\n", [(HIDDEN, INTERMEDIATE)]),
        (
            "lora_r: 16\nlora_target_modules: all-linear\n",
            [(HIDDEN, HIDDEN)] * 2 + [(KEYS, HIDDEN)] * 2 + [(INTERMEDIATE, HIDDEN)] * 3,
        ),
        # whole modules are trained beside the matrices in both, so they are no part of the budget
        ("lora_r: 32\nlora_target_modules: [o_proj]\nlora_modules_to_save: [lm_head]\n", [(HIDDEN, HIDDEN)]),
    ],
)
def test_k_is_as_many_parameters_as_lora_has(configs, tmp_path, lines, shapes):
    rank = yaml.safe_load(lines)["lora_r"]
    expected = LAYERS * sum(rank * (rows + columns) for rows, columns in shapes)
    converted = convert_recipe(lora(tmp_path, configs, lines))
    assert converted.budget == {"params": expected}
    assert f"k: {{params: {expected}}}  # LoRA trained {expected:,} parameters\n" in converted.after


def test_less_than_a_matrix_is_one_matrix(configs, tmp_path):
    converted = convert_recipe(lora(tmp_path, configs, "lora_r: 2\nlora_target_modules: [q_proj]\n"))
    assert converted.budget == 1 and "one matrix has 512 to 1,536" in converted.after


def test_a_model_out_of_reach_gets_the_default_share_and_is_named(tmp_path):
    converted = convert_recipe(written(tmp_path / "a.yaml", "model_name_or_path: no/such-model\nuse_peft: true\n"))
    assert converted.budget == "10%"
    assert any("LoRA's size is unknown" in note and "no/such-model" in note for note in converted.notes)


@pytest.mark.parametrize(("options", "k"), [({"match": "share"}, "10%"), ({"k": 75}, 75)])
def test_other_budgets(configs, tmp_path, options, k):
    assert convert_recipe(lora(tmp_path, configs, "lora_r: 32\n"), **options).budget == k


def test_each_key_that_is_lost_is_explained(configs, tmp_path):
    example = next(path for path in EXAMPLES if path.stem == "qlora")
    notes = "\n".join(convert_recipe(on_disk(example, configs, tmp_path)).notes)
    assert "include: ['*.q_proj.weight', " in notes and "learning_rate stays 0.0002" in notes
    text = "beta: 0.1\nuse_dora: true\nuse_rslora: false\n"
    notes = "\n".join(convert_recipe(lora(tmp_path, configs, text)).notes)
    assert "beta: no keys of `trl sft`" in notes and "use_dora: the magnitudes" in notes and "use_rslora" not in notes


@pytest.mark.parametrize(
    ("stem", "keys", "words"),
    [
        ("qlora", ["load_in_4bit", "bnb_4bit_quant_type", "use_bnb_nested_quant"], "stays quantized"),
        ("int8", ["load_in_8bit"], "stays quantized"),
        ("llama3_qlora_sft", ["quantization_bit", "quantization_method"], "stays quantized"),
        # Axolotl quantizes for lora and qlora alone
        ("qlora_moe", [], "loaded in bfloat16, where it takes"),
    ],
)
def test_the_base_stays_quantized_where_it_can(configs, tmp_path, stem, keys, words):
    example = next(path for path in EXAMPLES if path.stem == stem)
    converted = convert_recipe(on_disk(example, configs, tmp_path))
    after = yaml.safe_load(converted.after)
    assert [key for key in after if key.startswith(("load_in", "bnb_", "use_bnb", "quantiz"))] == keys
    assert words in "\n".join(converted.notes)


@pytest.mark.parametrize(
    ("line", "said"),
    [("learning_rate: 2e-5", False), ("learning_rate: 5.0e-5", False), ("learning_rate: 1e-4", True), ("", True)],
)
def test_a_learning_rate_of_loras_is_pointed_out(configs, tmp_path, line, said):
    notes = convert_recipe(lora(tmp_path, configs, f"{line}\n")).notes
    assert any(note.startswith("learning_rate stays") for note in notes) is said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model_name_or_path: x\ndataset_name: y\n", ["no LoRA recipe of TRL", "use_peft"]),
        ("base_model: x\nadapter: llama-adapter\n", ["no LoRA recipe of Axolotl", "llama-adapter"]),
        ("model_name_or_path: x\nstage: sft\nfinetuning_type: full\n", ["LLaMA-Factory", "full"]),
        ("model_name_or_path: x\nadapter_name_or_path: y\ntemplate: z\nexport_dir: w\n", ["kappatune merge"]),
        ("base_model: x\nadapter: kappatune\n", ["already"]),
        ("model_name_or_path: x\nkappatune: {k: 3}\n", ["already"]),
        ("a: 1\n", ["whose recipe", "--toolkit"]),
        ("{model_name_or_path: x, use_peft: true}\n", ["one key on each line"]),
        ("lora: &l {use_peft: true}\nmodel_name_or_path: x\n<<: *l\n", ["line by line", "<<:"]),
        ("use_peft: true\nuse_peft: true\n", ["keys twice"]),
    ],
)
def test_what_cannot_be_converted(tmp_path, text, words):
    with pytest.raises(KappaTuneError) as error:
        convert_recipe(written(tmp_path / "a.yaml", text))
    assert all(word in str(error.value) for word in words), str(error.value)


def test_the_command_writes_only_when_told_to_and_keeps_the_old(configs, tmp_path):
    path = lora(tmp_path, configs, "lora_r: 32   # size\n# after\noutput_dir: out\ndataset_name: trl-lib/Capybara\n")
    old = path.read_text(encoding="utf-8")
    code, out, _ = kappatune("convert", path)
    assert code == 0 and "-lora_r: 32   # size" in out and "+kappatune:" in out and "--write" in out
    assert [each.name for each in tmp_path.iterdir()] == ["lora.yaml"] and path.read_text(encoding="utf-8") == old
    code, out, _ = kappatune("convert", path, "--write")
    assert code == 0 and f"kappatune sft --config {path}" in out
    assert (tmp_path / "lora.lora.yaml").read_text(encoding="utf-8") == old
    assert load_recipe(path).kappatune.k == {"params": 2 * 32 * (2 * HIDDEN + HIDDEN + KEYS)}
    code, _, errors = kappatune("convert", path)
    assert code == 2 and "already" in errors
    code, _, errors = kappatune("convert", tmp_path / "lora.lora.yaml", "--write", "--output", path)
    assert code == 2 and "is there already" in errors


@pytest.mark.parametrize(
    ("text", "after"),
    [
        ("a: 1 # one\nb: 2\n# end", "# end"),
        ("b:\n- 1\n\n- 2\n# about c\nc: 3\na: 1", "# about c\nc: 3\n"),
        ("b: |\n  x\n\n  y\n\nc: 'd #'  # e\na:\n", "\nc: 'd #'  # e\n"),
        ("a: >-\r\n  x\r\n  y\r\nb: {d: 1,\r\n e: 2}\r\nc: f\r\n", "c: f\r\n"),
        ("b:\n  d:\n    e: [1,\n     2]\n\n\nc: x\n", "\n\nc: x\n"),
        ("a: 'x\n  y'\nc: x\nb: x\n  y\n", "c: x\n"),
    ],
)
def test_removing_keys_leaves_every_other_byte(text, after):
    edit = YamlText(text)
    for key in {"a", "b"} & set(edit.keys):
        edit.remove(key)
    assert edit.text() == after


def test_lists_and_values_are_changed_in_place():
    edit = YamlText("a:  # first\n  - x\n  # two\n  - y  # z\nb: [1, 2]\nc: 3 # four\nd:\n")
    edit.append("a", "new")
    edit.append("b", "new")
    edit.set("c", "5")
    edit.append("d", "new")
    assert edit.text() == "a:  # first\n  - x\n  # two\n  - y  # z\n  - new\nb: [1, 2, new]\nc: 5  # four\nd: [new]\n"


def test_a_full_disk_leaves_the_recipe_and_nothing_beside_it(configs, tmp_path, monkeypatch):
    def full(path: Path, text: str) -> None:
        if Path(path).name == "lora.yaml":
            raise KappaTuneError("No space left on device")
        Path(path).write_text(text, encoding="utf-8")

    lines = f"model_name_or_path: {configs / 'dense'}\nuse_peft: true\nlora_r: 8\nwarmup_ratio: 0.03\noutput_dir: o\n"
    path = written(tmp_path / "lora.yaml", lines)
    conversion = convert_recipe(path)
    assert any("warmup_steps: 0.03" in note for note in conversion.notes) or "warmup_ratio" in trl_keys()
    monkeypatch.setattr(convert, "write_text", full)
    with pytest.raises(KappaTuneError, match="No space left"):
        conversion.write()
    assert [each.name for each in tmp_path.iterdir()] == ["lora.yaml"] and path.read_text(encoding="utf-8") == lines
