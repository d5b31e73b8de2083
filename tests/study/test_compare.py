"""Comparisons and sweeps on a tiny model, whole."""

import copy
import io
import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from tqdm import tqdm
from trl import SFTTrainer

from helpers.command import kappatune
from helpers.recipes import tiny_recipe, write_recipe
from kappatune_plugin import KappaTuneError
from kappatune_plugin.forgetting.measures import base_in_place, kl_to_base
from kappatune_plugin.study import compare as compare_module
from kappatune_plugin.study import session, training
from kappatune_plugin.study.bench import Bench
from kappatune_plugin.study.compare import compare
from kappatune_plugin.study.methods import parse_methods
from kappatune_plugin.study.settings import Settings
from kappatune_plugin.study.training import train_run

SETTINGS = Settings(seeds=(0, 1), learning_rates=(1e-3, 1e-2), every=3, smooth=2)
METHODS = parse_methods("lowest,lora,full")


SECRET = "SECRET-a1b2"


@pytest.fixture(scope="module")
def recipe(saved_olmoe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    return write_recipe(folder / "recipe.yaml", tiny_recipe(folder, saved_olmoe, max_steps=6, hub_token=SECRET))


@pytest.fixture(scope="module")
def bench(recipe) -> Bench:
    return Bench.load(recipe, validation=0.25)


@pytest.fixture(scope="module")
def whole(bench, tmp_path_factory) -> tuple[Path, dict]:
    """A finished comparison: its folder, and what it says. Read only."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, compare(bench, METHODS, SETTINGS, folder)


def without_times(content: dict) -> dict:
    content = copy.deepcopy(content)
    for method in content["methods"]:
        del method["seconds"]
    return content


def test_no_file_of_a_comparison_holds_a_secret(recipe, whole):
    folder, content = whole
    assert SECRET in recipe.read_text() and content["recipe"]["data"] and SECRET not in json.dumps(content)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files and [path for path in files if SECRET.encode() in path.read_bytes()] == []


def test_every_method_saw_the_same_batches(bench):
    orders = [train_run(bench, method, 1e-3, 0, every=6)["order"] for method in METHODS]
    assert len(orders[0]) == 6 and orders[0] == orders[1] == orders[2]
    assert train_run(bench, METHODS[0], 1e-3, 1, every=6)["order"] != orders[0]


def test_other_batches_are_refused(bench, tmp_path, monkeypatch):
    runs = iter(range(100))

    def elsewhere(*args, **kwargs):
        return {**train_run(*args, **kwargs), "order": [f"{next(runs)}"]}

    monkeypatch.setattr(compare_module, "train_run", elsewhere)
    with pytest.raises(KappaTuneError, match="same batches"):
        compare(bench, METHODS[:2], Settings(seeds=(0,), learning_rates=(1e-3,), every=6, smooth=2), tmp_path)


@pytest.mark.slow
def test_the_state_at_the_target_is_that_of_its_step(bench, whole):
    """The measurements at the crossing against those of a run that measures after every step."""
    _, content = whole
    for method, entry in zip(METHODS, content["methods"], strict=True):
        for place, seed in enumerate(SETTINGS.seeds):
            step = entry["matched"]["step"]["values"][place]
            every_step = train_run(bench, method, entry["learning_rate"], seed, every=1)
            last = [sum(every_step["losses"][end - 2 : end]) / 2 for end in range(2, 7)]
            assert step == next(end for end, mean in enumerate(last, start=2) if mean <= content["target_loss"])
            point = every_step["points"][int(step) - 1]
            rise = point["control_loss"] - content["before"]["control_loss"]
            assert entry["matched"]["control_loss_change"]["values"][place] == rise
            assert entry["matched"]["task_text_kl"]["values"][place] == point["task_text_kl"]
            assert entry["matched"]["replay_error"]["values"][place] == 0


def test_the_target_is_the_worst_runs_best(whole):
    _, content = whole
    lowest = [value for entry in content["methods"] for value in entry["lowest_loss"]["values"]]
    assert content["target_loss"] == max(lowest) and len(lowest) == 6
    assert all(None not in entry["matched"]["step"]["values"] for entry in content["methods"])


def test_each_method_has_its_best_learning_rate(whole):
    _, content = whole
    for entry in content["methods"]:
        losses = {float(rate): each["validation_loss"] for rate, each in entry["grid"].items()}
        assert losses[entry["learning_rate"]] == min(losses.values()) and len(losses) == 2
        assert entry["at_edge_of_grid"]
    lowest, lora, full = (entry["trains"] for entry in content["methods"])
    assert sum(lowest.values()) == 7 and lora is full is None


def test_a_grid_is_widened_until_the_best_rate_is_inside(bench, tmp_path, monkeypatch):
    """Validation loss as a function of the rate is made up: best near 3e-2."""

    def made_up(bench, method, rate, *args):
        return {**real, "validation_loss": abs(math.log(rate / 3e-2))}

    real = train_run(bench, METHODS[0], 1e-3, 0, every=6)
    monkeypatch.setattr(compare_module, "train_run", made_up)
    for widen, expected, chosen in ((0, [1e-3, 3e-3], 3e-3), (1, [1e-3, 3e-3, 9e-3], 9e-3)):
        (found,) = compare(
            bench, METHODS[:1], SETTINGS.model_copy(update={"learning_rates": (1e-3, 3e-3), "widen": widen}), tmp_path
        )["methods"]
        assert [float(rate) for rate in found["grid"]] == expected and found["learning_rate"] == chosen
        assert found["at_edge_of_grid"]
    wide = SETTINGS.model_copy(update={"learning_rates": (1e-3, 3e-3), "widen": 9})
    (found,) = compare(bench, METHODS[:1], wide, tmp_path)["methods"]
    assert [float(rate) for rate in found["grid"]] == [1e-3, 3e-3, 9e-3, 2.7e-2, 8.1e-2]
    assert found["learning_rate"] == 2.7e-2 and not found["at_edge_of_grid"]


def test_the_rate_beyond_the_best_one():
    assert compare_module.rate_beyond({1e-3: 0.5, 1e-2: 0.4}) == 0.1
    assert compare_module.rate_beyond({1e-3: 0.4, 1e-2: 0.4, 1e-1: None}) == 1e-4
    assert compare_module.rate_beyond({1e-3: 0.5, 1e-2: 0.4, 1e-1: 0.6}) is None
    assert compare_module.rate_beyond({1e-3: None, 1e-2: None}) == 1e-4


def test_what_was_forgotten_is_measured_against_the_base(bench):
    """`full` borrows the base's values for it, and gives them back."""
    before = {name: value.clone() for name, value in bench.base.state_dict().items()}
    model = copy.deepcopy(bench.base)
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(1.1)
    pieces = bench.probe.controls["control"]
    borrowed = copy.deepcopy(model)
    borrowed.disable_adapter = lambda: base_in_place(borrowed, bench.base)
    total, tokens = 0.0, 0
    for piece in pieces:
        ids = torch.tensor([piece])
        base, tuned = (each(input_ids=ids).logits[0, :-1].log_softmax(-1) for each in (bench.base, model))
        total += (base.exp() * (base - tuned)).sum().item()
        tokens += len(piece) - 1
    assert kl_to_base(borrowed, pieces) == pytest.approx(total / tokens, rel=1e-4) and total > 0
    assert all(torch.equal(before[name], value) for name, value in bench.base.state_dict().items())
    changed = dict(borrowed.named_parameters())
    assert all(torch.equal(changed[name], value) for name, value in model.named_parameters())


def test_full_trains_everything_and_leaves_the_base(bench, whole):
    _, content = whole
    full = content["methods"][2]
    assert full["trainable"]["mean"] == content["parameters"]
    assert full["final"]["control_kl"]["mean"] > 0 and full["final"]["task_text_kl"]["mean"] > 0
    assert bench.measure(bench.base) == content["before"]


def test_interrupted_and_resumed_equals_uninterrupted(bench, whole, tmp_path, monkeypatch):
    """The fourth run is killed in its middle; the finished ones are not made again."""
    steps = []
    real = training._Course.on_step_end

    def killed(self, *args, **kwargs):
        steps.append(1)
        if len(steps) == 3 * 6 + 4:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(training._Course, "on_step_end", killed)
        with pytest.raises(KeyboardInterrupt):
            compare(bench, METHODS, SETTINGS, tmp_path)
    left = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    assert len(left) == 3
    resumed = compare(bench, METHODS, SETTINGS, tmp_path)
    assert without_times(resumed) == without_times(whole[1])
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    assert left.items() <= after.items() and after.keys() == {path.name for path in (whole[0] / "runs").iterdir()}


def test_the_bar_moves_inside_a_run_and_never_falls_back(bench, tmp_path, monkeypatch):
    class Recorded(tqdm):
        def __init__(self, **settings):
            super().__init__(**settings, file=io.StringIO())
            shares.append(self)

        def update(self, more=1):
            super().update(more)
            shares.append(self.n / self.total)

    shares = []
    monkeypatch.setattr(compare_module, "tqdm", Recorded)
    compare(bench, METHODS[:1], SETTINGS.model_copy(update={"widen": 2}), tmp_path)
    bar, *shares = shares
    assert shares == sorted(shares) and shares[-1] == pytest.approx(1)
    assert any(share * bar.total % 1 == pytest.approx(1 / 6) for share in shares)


def test_finished_runs_are_taken_for_another_target(bench, whole, monkeypatch):
    folder, content = whole
    monkeypatch.setattr(compare_module, "train_run", None)
    never = Settings(**{**vars(SETTINGS), "target_loss": 1e-6})
    again = compare(bench, METHODS, never, folder)
    assert all(entry["matched"] is None for entry in again["methods"])
    assert again["methods"][0]["final"] == content["methods"][0]["final"]


@pytest.mark.parametrize("changed", ["control", "test", "facts"])
def test_runs_measured_on_other_data_are_not_taken(saved_olmoe, tmp_path, changed):
    path = write_recipe(tmp_path / "recipe.yaml", tiny_recipe(tmp_path, saved_olmoe))
    before, again = (Bench.load(path, validation=0.25).identity for _ in range(2))
    file = tmp_path / f"{changed}.jsonl"
    rows = file.read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join(rows[1:]), encoding="utf-8")
    assert before == again != Bench.load(path, validation=0.25).identity


@pytest.mark.slow
def test_a_target_given_beforehand_is_measured_on_the_way(bench, whole, tmp_path):
    """The same as repeating the runs up to there, which a target that only shows at the end needs."""
    given = Settings(**{**vars(SETTINGS), "target_loss": whole[1]["target_loss"]})
    found = compare(bench, METHODS, given, tmp_path)
    for entry, other in zip(found["methods"], whole[1]["methods"], strict=True):
        assert entry["matched"] == other["matched"] and entry["final"] == other["final"]
        chosen = entry["grid"][f"{entry['learning_rate']:g}"]["at_target"]
        assert chosen["control_loss_change"] == entry["matched"]["control_loss_change"]["values"][0]
    assert not list((tmp_path / "runs").glob("*-to*")) and list((whole[0] / "runs").glob("*-to*"))


def test_runs_that_stop_at_the_target(bench, whole, tmp_path):
    given = Settings(**{**vars(SETTINGS), "target_loss": whole[1]["target_loss"], "stop_at_target": True})
    found = compare(bench, METHODS[:2], given, tmp_path)["methods"][0]
    assert found["final"] is None and not list((tmp_path / "runs").glob("*-to*"))
    for path in (tmp_path / "runs").glob("lowest*"):
        run = json.loads(path.read_text())["run"]
        reached = None if run["at_target"] is None else run["at_target"]["step"]
        assert len(run["losses"]) == (6 if reached is None else reached)
    # its rate may be another: validation loss is that of the step it stopped at
    if found["learning_rate"] == whole[1]["methods"][0]["learning_rate"]:
        assert found["matched"] == whole[1]["methods"][0]["matched"]
    with pytest.raises(KappaTuneError, match="give target_loss"):
        Settings(**{**vars(SETTINGS), "stop_at_target": True})


def test_compare_as_typed(recipe, tmp_path):
    words = ["compare", "--config", recipe, "--methods", "lowest,lora", "--seeds", 2, "--learning_rates", "1e-2"]
    words += ["--smooth", 2, "--every", 3, "--validation", 0.25, "--output_dir", tmp_path / "out"]
    code, out, _ = kappatune(*words)
    assert code == 0
    for shown in ("first reaches", "After 6 steps", "± 95% interval over 2 seeds", "recall", str(tmp_path / "out")):
        assert shown in " ".join(out.split()) or shown in out
    content = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert content["format"] == 1 and content["settings"]["learning_rates"] == [1e-2]
    assert {"torch", "trl", "peft", "kappatune-plugin"} <= content["versions"].keys()
    for name in ("frontier.png", "matched.png"):
        with Image.open(tmp_path / "out" / name) as picture:
            assert 600 < picture.width < 900, "of a README's width"
    code, out, _ = kappatune(*words, "--target_loss", "1e-6")
    assert (
        code == 0 and "not reached" in out and "Not all runs of lowest, lora reach the target" in " ".join(out.split())
    )


def test_sweep_as_typed(recipe, tmp_path):
    code, out, _ = kappatune(
        "sweep", "--config", recipe, "--k", "10%,100%", "--seeds", 1, "--validation", 0.25, "--smooth", 2,
        "--max_steps", 3, "--output_dir", tmp_path / "out",
    )  # fmt: skip
    assert code == 0 and "Recommended: k: " in out and "one seed: no interval" in out
    content = json.loads((tmp_path / "out" / "sweep.json").read_text())
    trained = [entry["trainable"]["mean"] for entry in content["methods"]]
    assert trained == sorted(trained) and content["recommendation"]["method"] in ("lowest:k=10%", "lowest:k=100%")
    with Image.open(tmp_path / "out" / "budgets.png") as picture:
        assert 600 < picture.width < 900


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--methods", "lowset"], ["'lowset'", "Did you mean 'lowest'?"]),
        (["--seeds", "0"], ["seeds", "at least 1"]),
        (["--learning_rates", "1e-3,fast"], ["learning_rates", "fast"]),
        (["--learning_rates", "0"], ["learning_rates", "above 0"]),
        (["--every", "0", "--smooth", "0"], ["every", "smooth"]),
        (["--smooth", "7"], ["mean over 7 steps", "a run has 6", "--smooth 6"]),
        (["--target_loss", "-1"], ["target_loss: -1.0 is not a number above 0"]),
        (["--widen", "1", "--learning_rates", "1e-3"], ["widen", "2 learning_rates"]),
        (["--methods", "lora:r=x"], ["'lora:r=x': r is 'x', and takes a whole number."]),
        (["--validation", "1.5"], ["validation", "1.5"]),
        (["--validation", "0.99"], ["too few"]),
        (["--kappatune.k", "1000"], ["1000", "58"]),
        (["--learning_rat", "1"], ["'learning_rate'"]),
        (["--output_dir", "/proc/nowhere"], ["Can't write in '/proc/nowhere'"]),
    ],
)
def test_mistakes(recipe, tmp_path, words, expected):
    output = [] if "--output_dir" in words else ["--output_dir", str(tmp_path)]
    smooth = [] if "--smooth" in words else ["--smooth", "2"]
    code, _, errors = kappatune("compare", "--config", recipe, *output, *smooth, *words)
    assert code == 2
    for word in expected:
        assert word in errors, errors


@pytest.mark.parametrize("words", [["--learning_rates", "fast"], ["--seeds", 0], ["--smooth", 0], ["--stop_at_target"]])
def test_mistakes_show_before_the_model_is_loaded(recipe, tmp_path, monkeypatch, words):
    monkeypatch.setattr(Bench, "load", None)
    code, _, errors = kappatune("compare", "--config", recipe, "--output_dir", tmp_path / "out", *words)
    assert code == 2 and words[0][2:] in errors and not (tmp_path / "out").exists()


def test_the_recipes_own_rate_is_not_rounded():
    assert session._rates(None, 1.25e-5, session.GRID) == (3.8e-6, 1.25e-5, 3.8e-5)
    assert session._rates("3e-3,1e-3", 1.25e-5, session.GRID) == (1e-3, 3e-3)


@pytest.mark.parametrize("budgets", ["{params: 1M", "10%,[", "lots"])
def test_budgets_that_are_none(recipe, tmp_path, budgets):
    code, _, errors = kappatune("sweep", "--config", recipe, "--k", budgets, "--output_dir", tmp_path)
    assert code == 2 and "is no budget" in errors


def test_a_method_that_pefts_refuses_is_named(bench):
    with pytest.raises(KappaTuneError, match="prefix_tuning: PEFT"):
        train_run(bench, parse_methods("prefix_tuning")[0], 1e-3, 0, every=6)
    # this one shows when its parameters are counted
    with pytest.raises(KappaTuneError, match="lora:lora_dropout=2: PEFT"):
        train_run(bench, parse_methods("lora:lora_dropout=2")[0], 1e-3, 0, every=6)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_only_what_peft_raises_is_put_down_to_it(bench, monkeypatch, method):
    """Such as a GPU whose driver fails."""

    def fails(*_, **__):
        raise RuntimeError("the driver failed")

    monkeypatch.setattr(SFTTrainer, "__init__", fails)
    with pytest.raises(RuntimeError, match="the driver failed"):
        train_run(bench, parse_methods(method)[0], 1e-3, 0, every=6)
