from pathlib import Path

import pytest
import yaml

from helpers.recipes import tiny_recipe, write_recipe
from kappatune_plugin import KappaTuneError
from kappatune_plugin.recipe.recipe import load_recipe
from kappatune_plugin.recipe.trl_keys import GONE_KEYS, trl_keys
from kappatune_plugin.selection.budget import parse_budget

RECIPES = sorted((Path(__file__).parents[2] / "recipes").rglob("*.yaml"))


@pytest.fixture
def load(saved_olmoe, tmp_path):
    """Load the tiny recipe with `changes`, and overrides laid over it."""

    def load(*overrides, **changes):
        path = write_recipe(tmp_path / "recipe.yaml", tiny_recipe(tmp_path, saved_olmoe, **changes))
        return load_recipe(path, overrides)

    return load


def refused(load, *overrides, **changes) -> str:
    with pytest.raises(KappaTuneError) as error:
        load(*overrides, **changes)
    return str(error.value)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_shipped_recipes_can_be_read(path):
    if "train_sampling_strategy" in path.read_text() and "train_sampling_strategy" not in trl_keys():
        pytest.skip("it needs a key of transformers 5")
    recipe = load_recipe(path)
    assert recipe.forgetting is not None and {"norm", "bias"} < set(recipe.kappatune.exclude)


def test_keys_reach_their_owners(load):
    recipe = load(lr_scheduler_type="constant", attn_implementation="eager", dataset_train_split="part")
    assert recipe.training_args.learning_rate == 1e-2
    assert recipe.training_args.lr_scheduler_type == "constant"
    assert recipe.model_args.attn_implementation == "eager"
    assert recipe.script_args.dataset_train_split == "part"
    assert recipe.kappatune.k == 7 and recipe.kappatune.task_type == "CAUSAL_LM"
    assert recipe.forgetting.every == 2
    assert recipe.data["labels"] == {0: "bad", 1: "good"}


@pytest.mark.parametrize(
    ("overrides", "read"),
    [
        (["--learning_rate", "1e-4"], lambda recipe: recipe.training_args.learning_rate == 1e-4),
        (["--learning-rate=1e-4"], lambda recipe: recipe.training_args.learning_rate == 1e-4),
        (["--max_steps", "3", "--bf16", "false"], lambda recipe: recipe.training_args.max_steps == 3),
        (["--packing"], lambda recipe: recipe.training_args.packing is True),
        (["--no_packing"], lambda recipe: recipe.training_args.packing is False),
        (["--save_strategy", "no"], lambda recipe: recipe.training_args.save_strategy == "no"),
        (["--kappatune.k", "10%"], lambda recipe: recipe.kappatune.k == "10%"),
        (["--kappatune_k", "10%"], lambda recipe: recipe.kappatune.k == "10%"),
        (["--kappatune-exclude=[norm]"], lambda recipe: recipe.kappatune.exclude == ["norm"]),
        (["--kappatune.k", "{params: 2M}"], lambda recipe: recipe.kappatune.k == {"params": "2M"}),
        (["--kappatune.exclude", "[norm, router]"], lambda recipe: recipe.kappatune.exclude == ["norm", "router"]),
        (["--forgetting.control", "self"], lambda recipe: recipe.forgetting.control == "self"),
        (["--forgetting.every", "0"], lambda recipe: recipe.forgetting.every == 0),
        (["--data.train.split", "train[:3]"], lambda recipe: recipe.data["train"]["split"] == "train[:3]"),
        (["--data.prompt", "Say: {text}"], lambda recipe: recipe.data["prompt"] == "Say: {text}"),
    ],
)
def test_overrides(load, overrides, read):
    assert read(load(*overrides))


def test_the_flat_spelling_says_the_same(load):
    flat = load(kappatune=None, kappatune_k="10%", kappatune_order="highest", kappatune_exclude=["norm", "router"])
    nested = load(kappatune={"k": "10%", "order": "highest", "exclude": ["norm", "router"]})
    assert flat.kappatune == nested.kappatune and flat.resolved == nested.resolved
    mixed = load(kappatune={"k": "10%"}, kappatune_order="highest", kappatune_exclude=["norm", "router"])
    assert mixed.kappatune == nested.kappatune


def test_overrides_land_in_the_resolved_recipe(load):
    resolved = load("--kappatune.k", "9", "--max_steps", "2").resolved
    assert resolved["kappatune"] == {"k": 9} and resolved["max_steps"] == 2


def test_all_problems_at_once(load):
    message = refused(
        load,
        learning_rat=1,
        max_steps="many",
        kappatune={"k": -1, "exlude": ["norm"], "order": "lowst"},
        data={"train": {"path": "x"}, "prompt": "{text", "completion": " {label}", "lables": {}},
        forgetting={"every": -1, "contrl": "self"},
    )
    for words in (
        "9 problems",
        "unknown key 'learning_rat'. Did you mean 'learning_rate'?",
        "max_steps: expected a whole number, found 'many'",
        "unknown key 'kappatune.exlude'. Did you mean 'exclude'?",
        "k: -1",
        "lowst",
        "data.prompt: '{text'",
        "unknown key 'data.lables'. Did you mean 'labels'?",
        "every: -1",
        "unknown key 'forgetting.contrl'. Did you mean 'control'?",
    ):
        assert words in message, words


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kapatune": {"k": 3}, "kappatune": None}, ["'kapatune'. Did you mean 'kappatune'?"]),
        ({"kappatune": None}, ["block kappatune is missing"]),
        ({"kappatune": 75}, ["kappatune: expected a mapping"]),
        ({"data": 75}, ["data: expected a mapping of train, validation, test"]),
        ({"data": "rows.jsonl"}, ["data: expected a mapping of train, validation, test", "found 'rows.jsonl'"]),
        ({"forgetting": "self"}, ["forgetting: expected a mapping of control"]),
        ({"kappatune": {"rtol": True}}, ["kappatune.rtol: True is not a number"]),
        (
            {"kappatune": {"k": 3, "auto": {}, "scan_from": "a", "rank_by": "gain_over_forgetting"}},
            ["3 problems", "kappatune.auto is given", "kappatune.order is missing", "kappatune.scan_from: gain"],
        ),
        ({"model_name_or_path": None}, ["model_name_or_path is missing"]),
        ({"output_dir": None}, ["output_dir is missing"]),
        ({"data": None}, ["data is missing"]),
        ({"dataset_name": "some/thing"}, ["data and dataset_name", "delete one"]),
        ({"use_peft": True, "lora_r": 8}, ["use_peft, lora_r", "Delete"]),
        ({"eval_strategy": "stepps"}, ["eval_strategy", "steps"]),
        ({"kappatune_k": 3}, ["kappatune_k and kappatune.k", "delete one"]),
        ({"kappatune": 75, "kappatune_k": 3}, ["kappatune_k and kappatune: 75", "make kappatune a mapping"]),
        ({"kappatune": None, "kappatune_kk": 3}, ["unknown key 'kappatune.kk'"]),
        ({"kappatune": None, "kapatune_k": 3}, ["Did you mean 'kappatune_k'?"]),
        ({"kappatune": {"k": True}}, ["k: True"]),
        ({"kappatune": {"k": "ten%"}}, ["ten%"]),
        ({"kappatune": {"k": {"parms": 3}}}, ["parms"]),
        ({"kappatune": {"k": -1}}, ["k: -1"]),
        ({"kappatune": {"report": "nowhere.json"}}, ["report", "nowhere.json"]),
        ({"kappatune": {"selection": 3}}, ["selection", "3"]),
        ({"forgetting": {"control": "sefl"}}, ["forgetting.control", "Did you mean 'self'?"]),
    ],
)
def test_each_mistake_is_named(load, changes, words):
    message = refused(load, **changes)
    for word in words:
        assert word in message


@pytest.mark.parametrize("key", list(GONE_KEYS))
def test_keys_that_came_and_went_between_versions(load, key):
    """They pass where the installed versions have them, and are explained where not."""
    value = {"warmup_ratio": 0.1, "logging_dir": "logs", "torch_dtype": "float32"}.get(key, True)
    if key in trl_keys():
        assert load(**{key: value}).resolved[key] is not None
    else:
        message = refused(load, **{key: value})
        assert (
            "1 problem" in message
            and f"{key}: transformers " in message
            and GONE_KEYS[key].format(value=value) in message
        )


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"train": {"path": "a.jsonl"}, "prompt": "{text}"}, ["prompt is given alone"]),
        ({"prompt": "{text}", "completion": "{label}"}, ["data.train is missing"]),
        ({"train": {"path": "a.jsonl"}, "labels": {0: "x"}}, ["labels: give prompt", "or data.test"]),
        (
            {"train": {"path": "a"}, "prompt": "{text}", "completion": "{label}", "labels": {0: False}},
            ["quote the word of 0"],
        ),
        ({"train": "a", "test": "b", "labels": [False, "yes"]}, ["quote the word of False"]),
        ({"train": 3}, ["data.train: 3"]),
        ({"train": ["a.jsonl", 3]}, ["data.train[1]: 3"]),
        ({"train": {"path": "a.jsonl", "take": 0}}, ["data.train.take: 0"]),
        ({"train": "a.jsonl", "max_chars": 5}, ["data.max_chars counts", "missing"]),
        (
            {"train": "a.jsonl", "prompt": "{a}", "completion": "{b}", "max_chars": "x", "test": {"prompt": "{c"}},
            ["data.max_chars: 'x'", "data.test.path is missing", "data.test.prompt: '{c'"],
        ),
        ({"train": "a.jsonl", "test": {"path": "b.jsonl", "prompt": "{c}"}}, ["data.test.prompt", "are missing"]),
    ],
)
def test_each_mistake_of_the_data_is_named(load, data, words):
    message = refused(load, data=data)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["--kappatune.kk", "3"], "unknown key 'kappatune.kk'"),
        (["--learning_rat", "3"], "Did you mean 'learning_rate'?"),
        (["loose"], "'loose' belongs to no flag"),
        (["--max_steps", "3", "--max_steps", "4"], "--max_steps is given twice"),
        (["--kappatune.k", "1", "2"], "takes one value"),
        (["--kappatune_k", "3", "--kappatune.k", "4"], "--kappatune.k is given twice"),
        (["--max_steps", "soon"], "max_steps: expected a whole number"),
    ],
)
def test_mistakes_on_the_command_line(load, overrides, words):
    assert words in refused(load, *overrides)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "No such file"),
        ("", "holds nothing"),
        ("- a\n- b\n", "holds a list"),
        ("a: [1\n", "isn't YAML"),
        ("!!python/object/apply:os.system ['true']\n", "isn't YAML"),
        ("max_steps: 3\nmax_steps: 4\n", "max_steps is there twice, in lines 1 and 2"),
    ],
)
def test_files_that_are_no_recipe(tmp_path, text, words):
    if text is not None:
        (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(KappaTuneError) as error:
        load_recipe(tmp_path / "recipe.yaml")
    assert words in str(error.value)


def test_a_trl_recipe_needs_only_the_block(tmp_path, saved_olmoe):
    """`trl sft` keys as they come from its documentation."""
    text = f"""
model_name_or_path: {saved_olmoe}
dataset_name: trl-lib/Capybara
learning_rate: 2.0e-5
num_train_epochs: 1
packing: true
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
eos_token: '<|im_end|>'
eval_strategy: no
output_dir: {tmp_path / "out"}
kappatune:
  k: 75
"""
    (tmp_path / "recipe.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.script_args.dataset_name == "trl-lib/Capybara"
    assert recipe.training_args.eval_strategy == "no" and recipe.forgetting is None


def test_paths_start_in_the_recipes_folder(tmp_path, saved_olmoe, monkeypatch):
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "model").symlink_to(saved_olmoe)
    recipe = tiny_recipe(folder, Path("model"))
    recipe["data"]["train"] = {"path": "train.jsonl"}
    write_recipe(folder / "recipe.yaml", recipe)
    monkeypatch.chdir(tmp_path)
    loaded = load_recipe("recipes/recipe.yaml")
    assert Path(loaded.model_args.model_name_or_path).samefile(saved_olmoe)
    assert Path(loaded.data["train"]["path"]).samefile(folder / "train.jsonl")


def test_env_is_set_and_secrets_are_not_written(load, monkeypatch):
    from kappatune_plugin.recipe.public import public_yaml

    monkeypatch.setenv("KT_TEST_PLAIN", "")
    monkeypatch.setenv("DATABASE_URL", "")
    import os

    recipe = load(
        env={"KT_TEST_PLAIN": 1, "DATABASE_URL": "postgres://u:abc@h/db"},
        hub_token="abc",
        push_to_hub=False,
        eos_token="<eos>",
        model_init_kwargs={"token": "abc", "max_memory": {"cpu": "1GB"}},
        report_to="none",
        data={
            "train": {"path": "rows", "token": "abc", "storage_options": {"key": "abc"}},
            "test": {"path": "https://user:abc@example.org/rows.jsonl"},
        },
    )
    assert os.environ["KT_TEST_PLAIN"] == "1" and "abc" in os.environ["DATABASE_URL"]
    written = yaml.safe_load(public_yaml(recipe.resolved))
    assert "abc" not in str(written) and "env" not in written and "hub_token" not in written
    assert written["eos_token"] == "<eos>" and written["model_init_kwargs"] == {"max_memory": {"cpu": "1GB"}}
    assert written["data"] == {"train": {"path": "rows"}, "test": {"path": "https://...@example.org/rows.jsonl"}}


@pytest.mark.parametrize(
    ("text", "words"),
    [("run_name: 2024-02-30", "isn't YAML"), ("max_steps: .inf", "max_steps: expected a whole number, found inf")],
)
def test_values_that_no_python_object_holds(tmp_path, text, words):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(KappaTuneError, match=words):
        load_recipe(tmp_path / "recipe.yaml")
    with pytest.raises(KappaTuneError, match="is no budget"):
        parse_budget("9" * 5000)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/someone/data/train.jsonl", "train.jsonl"),
        ("/home/some one/train.jsonl", "train.jsonl"),
        ("~/models/olmoe", "olmoe"),
        ("[{path: /srv/data/a.jsonl}, {path: 'C:\\x\\b.jsonl'}]", "[{path: a.jsonl}, {path: 'b.jsonl'}]"),
        ("allenai/OLMoE-1B-7B-0924", "allenai/OLMoE-1B-7B-0924"),
        ("data/train.jsonl", "data/train.jsonl"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("Question {text} /no_think and/or </answer>", "Question {text} /no_think and/or </answer>"),
    ],
)
def test_a_card_shows_no_path_of_the_machine(text, shown):
    from kappatune_plugin.recipe.public import without_paths

    assert without_paths({"key": [text]}) == {"key": [shown]}
