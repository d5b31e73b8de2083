"""The command as people type it: exit codes, what it prints, what it leaves."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import kappatune_plugin
from helpers.command import kappatune
from helpers.recipes import tiny_recipe, write_recipe
from helpers.tiny import tiny_model
from kappatune_plugin import KappaReport, Selection
from kappatune_plugin.cli.app import app
from kappatune_plugin.scanning import scan as scanning


@pytest.fixture(scope="module")
def run(saved_olmoe, tmp_path_factory) -> Path:
    """A finished run's output_dir. Read only."""
    folder = tmp_path_factory.mktemp("run")
    code, _, _ = kappatune("sft", "--config", write_recipe(folder / "recipe.yaml", tiny_recipe(folder, saved_olmoe)))
    assert code == 0
    return folder / "out"


def test_the_command_is_installed():
    command = Path(sys.executable).parent / "kappatune"
    done = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.startswith("kappatune 0.")


def test_neither_help_nor_a_conversion_with_a_known_budget_waits_for_a_framework():
    """torch alone takes seconds to import."""
    recipe = Path(__file__).parents[1] / "toolkits/examples/axolotl/dora_saved.yaml"
    words = [["--help"], *([each.name or each.callback.__name__, "--help"] for each in app.registered_commands)]
    code = (
        "import sys; from kappatune_plugin.cli import app\n"
        f"for words in {[*words, ['convert', str(recipe), '--k', '50']]}:\n"
        "    try: app(words)\n"
        "    except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'peft', 'trl', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.count("Usage") == len(words) > 9 and "+  k: 50" in done.stdout
    assert done.stdout.rstrip().endswith("[]"), done.stderr


def test_a_recipes_mistakes_are_one_message_and_no_traceback(saved_olmoe, tmp_path):
    path = write_recipe(tmp_path / "recipe.yaml", tiny_recipe(tmp_path, saved_olmoe, learning_rat=1, kapatune={}))
    code, out, errors = kappatune("sft", "--config", path)
    assert code == 2 and "Traceback" not in errors + out
    assert "2 problems" in errors and "'learning_rate'" in errors and "'kappatune'" in errors


def test_markup_in_an_error_is_text(saved_olmoe, tmp_path):
    path = write_recipe(tmp_path / "recipe.yaml", tiny_recipe(tmp_path, saved_olmoe))
    code, _, errors = kappatune("sft", "--config", path, "--kappatune.include", "['[bold]*']")
    assert code == 2 and "[bold]*" in errors


def test_scan_writes_the_report_and_marks_the_lowest(saved_olmoe, tmp_path):
    code, out, _ = kappatune("scan", saved_olmoe, "--k", "10%", "--output", tmp_path / "report.json")
    report = KappaReport.load(tmp_path / "report.json")
    assert code == 0 and len(report.units) == 58 and "5 trained (*)" in out and str(tmp_path / "report.json") in out


def test_scan_finds_out_what_it_is_asked_for(tmp_path):
    """The K lowest alone, everything, another value to rank by, a picture."""
    size = {"hidden_size": 424, "intermediate_size": 800, "num_hidden_layers": 3, "num_key_value_heads": 4}
    tiny_model("llama", **size).save_pretrained(tmp_path / "model")
    output = ["--output", tmp_path / "report.json"]
    code, out, _ = kappatune("scan", tmp_path / "model", "--k", "3", *output)
    statuses = [unit.status for unit in KappaReport.load(tmp_path / "report.json").units]
    assert code == 0 and set(statuses) == {"ok", "above"} and f"{statuses.count('above')} matrices were measured" in out
    code, _, errors = kappatune("select", tmp_path / "report.json", "--k", "20")
    assert code == 2 and "--full" in errors
    code, out, _ = kappatune("scan", tmp_path / "model", "--k", "3", "--full", "--no-cache", *output)
    assert code == 0 and {unit.status for unit in KappaReport.load(tmp_path / "report.json").units} == {"ok"}
    plot = ["--rank_by", "stable_rank", "--plot", tmp_path / "kappa.png"]
    code, out, _ = kappatune("scan", tmp_path / "model", "--k", "3", *plot, *output)
    assert code == 0 and (tmp_path / "kappa.png").stat().st_size > 10_000 and "stable" in out
    code, _, errors = kappatune("scan", tmp_path / "model", "--rank_by", "size", *output)
    assert code == 2 and "stable_rank" in errors


def test_scan_takes_patterns(saved_olmoe, tmp_path):
    options = ["--include", "*.gate_proj.weight", "--exclude", "norm", "--output", tmp_path / "report.json"]
    code, out, _ = kappatune("scan", saved_olmoe, *options)
    assert code == 0 and "trained" not in out
    assert {unit.name.split(".")[-2] for unit in KappaReport.load(tmp_path / "report.json").units} == {"gate_proj"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{model}", "--k", "0"], "0"),
        (["{model}", "--exclude", "nrom"], "nrom"),
        (["./nowhere"], "nowhere"),
        (["{model}", "--output", "/proc/nowhere/report.json"], "Can't write"),
    ],
)
def test_scans_that_cannot_be(saved_olmoe, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    code, _, errors = kappatune("scan", *(word.replace("{model}", str(saved_olmoe)) for word in words))
    assert code == 2 and message in errors and not list(tmp_path.iterdir())


def test_a_k_that_is_too_large_is_refused_before_anything_is_measured(saved_olmoe, tmp_path, monkeypatch):
    monkeypatch.setattr(scanning, "measure", lambda *_, **__: pytest.fail("it measured"))
    code, _, errors = kappatune("scan", saved_olmoe, "--k", "1000", "--output", tmp_path / "report.json")
    assert code == 2 and "1000" in errors and "58" in errors
    assert not (tmp_path / "report.json").exists()


def test_select_chooses_from_a_report(run, tmp_path):
    target = tmp_path / "selection.json"
    code, out, _ = kappatune("select", run / "kappa_report.json", "--k", "{params: 2000}", "--output", target)
    units = Selection.load(target).units
    assert code == 0 and f"{len(units)} matrices are selected" in out
    assert 2000 - 32 * 32 < sum(unit.shape[0] * unit.shape[1] for unit in units) <= 2000
    code, _, errors = kappatune("select", run / "kappa_report.json", "--order", "lowst", "--output", target)
    assert code == 2 and "lowest" in errors


@pytest.mark.parametrize("option", ["--output", "--plot"])
@pytest.mark.parametrize(("path", "words"), [("", "it is a folder"), ("file/x", "Can't write in")])
def test_a_scan_that_cannot_be_written_does_not_start(saved_olmoe, tmp_path, monkeypatch, option, path, words):
    monkeypatch.setattr(kappatune_plugin, "scan", lambda *_, **__: pytest.fail("it scanned"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    code, _, errors = kappatune("scan", saved_olmoe, option, tmp_path / path)
    assert code == 2 and words in errors


def test_a_plot_of_an_unknown_format_is_refused_before_the_scan(saved_olmoe, tmp_path, monkeypatch):
    monkeypatch.setattr(kappatune_plugin, "scan", lambda *_, **__: pytest.fail("it scanned"))
    code, _, errors = kappatune("scan", saved_olmoe, "--plot", tmp_path / "k.xyz", "--output", tmp_path / "r.json")
    assert code == 2 and "k.xyz: its ending is none of" in errors and ".png" in errors


def test_merged_is_a_plain_checkpoint_with_the_trained_values(run, saved_olmoe, tmp_path):
    code, out, _ = kappatune("merge", run, "--output_dir", tmp_path / "merged")
    assert code == 0 and str(tmp_path / "merged") in out
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(saved_olmoe, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(base, str(run)).merge_and_unload()
    for name, value in tuned.state_dict().items():
        assert torch.equal(value, merged.state_dict()[name]), name
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("the cat")["input_ids"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged"], "no temporary folder is left"


def test_merge_replaces_only_when_told_to(run, tmp_path):
    target = tmp_path / "merged"
    target.mkdir()
    (target / "mine.txt").write_text("keep")
    code, _, errors = kappatune("merge", run, "--output_dir", target)
    assert code == 2 and "--overwrite" in errors and (target / "mine.txt").read_text() == "keep"
    code, _, errors = kappatune("merge", run, "--output_dir", target, "--overwrite")
    assert code == 2 and "such as mine.txt" in errors and (target / "mine.txt").read_text() == "keep"
    (target / "mine.txt").unlink()
    assert kappatune("merge", run, "--output_dir", target)[0] == 0
    (target / "config.json").write_text("{}")
    (target / "model-00009-of-00009.safetensors").write_text("of an older one")
    assert kappatune("merge", run, "--output_dir", target, "--overwrite")[0] == 0
    assert "olmoe" in (target / "config.json").read_text() and not list(target.glob("model-0*"))


def test_a_merge_that_fails_leaves_what_was_there(run, tmp_path):
    broken = Path(shutil.copytree(run, tmp_path / "broken"))
    weights = broken / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    target = tmp_path / "merged"
    target.mkdir()
    (target / "mine.txt").write_text("keep")
    code, _, errors = kappatune("merge", broken, "--output_dir", target, "--overwrite")
    assert code == 2 and "Can't load the adapter" in errors
    assert (target / "mine.txt").read_text() == "keep"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "merged"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda adapter, _: (adapter / "adapter_config.json").unlink(), "holds no adapter_config.json"),
        (lambda adapter, _: (adapter / "adapter_config.json").write_text("{"), "Can't read"),
        (
            lambda adapter, _: (adapter / "adapter_config.json").write_text('{"peft_type": "NO_SUCH"}'),
            "'NO_SUCH' is no",
        ),
        (lambda adapter, _: (adapter / "adapter_model.safetensors").unlink(), "holds no adapter_model.safetensors"),
        (lambda adapter, _: save_file({}, adapter / "adapter_model.safetensors"), "holds no values"),
        (lambda adapter, _: _spoil(adapter / "adapter_model.safetensors"), "aren't finite"),
        (lambda adapter, _: _without_fingerprints(adapter / "adapter_model.safetensors"), "doesn't say which base"),
        (lambda adapter, _: _without_a_unit(adapter / "adapter_config.json"), "adapter's own files disagree"),
    ],
)
def test_adapters_that_cannot_be_merged(run, tmp_path, change, words):
    adapter = Path(shutil.copytree(run, tmp_path / "adapter"))
    change(adapter, tmp_path)
    code, _, errors = kappatune("merge", adapter, "--output_dir", tmp_path / "merged")
    assert code == 2 and words in errors and not (tmp_path / "merged").exists()


def _spoil(weights: Path) -> None:
    values = load_file(weights)
    next(value for name, value in values.items() if name.endswith(".weight"))[0, 0] = torch.nan
    save_file(values, weights)


def _without_fingerprints(weights: Path) -> None:
    save_file({name: value for name, value in load_file(weights).items() if name.endswith(".weight")}, weights)


def _without_a_unit(path: Path) -> None:
    content = json.loads(path.read_text())
    content["selection"]["units"].pop()
    path.write_text(json.dumps(content))


def test_merging_over_the_folder_of_the_adapter_is_an_error(run, tmp_path):
    adapter = Path(shutil.copytree(run, tmp_path / "runs" / "adapter"))
    code, _, errors = kappatune("merge", adapter, "--output_dir", tmp_path / "runs", "--overwrite")
    assert code == 2 and f"holds '{adapter}'" in errors.replace("\n", "")
    assert (adapter / "adapter_model.safetensors").is_file()


def _cut_off(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_cut_off, "Can't load a model from"),
        (lambda model: (model / "config.json").write_text('{"model_type": "no_such"}'), "no_such"),
        (lambda model: (model / "config.json").unlink(), "model_type"),
        (lambda model: (shutil.rmtree(model), tiny_model("llama").save_pretrained(model)), "TRL can't train"),
        (shutil.rmtree, "there is no such folder"),
    ],
)
def test_a_base_that_cannot_be_loaded_is_one_message(saved_olmoe, tmp_path, change, words):
    model = Path(shutil.copytree(saved_olmoe, tmp_path / "model"))
    change(model)
    code, _, errors = kappatune("sft", "--config", write_recipe(tmp_path / "recipe.yaml", tiny_recipe(tmp_path, model)))
    assert code == 2 and words in errors


def test_a_damaged_base_is_not_merged(run, saved_olmoe, tmp_path):
    model = Path(shutil.copytree(saved_olmoe, tmp_path / "model"))
    _cut_off(model)
    code, _, errors = kappatune("merge", run, "--model", model, "--output_dir", tmp_path / "merged")
    assert code == 2 and "Can't load the base model" in errors and not (tmp_path / "merged").exists()


def test_merging_into_another_base_is_an_error(run, saved_olmoe, tmp_path):
    other = AutoModelForCausalLM.from_pretrained(saved_olmoe, dtype=torch.float32)
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight.mul_(1.01)
    other.save_pretrained(tmp_path / "other")
    code, _, errors = kappatune("merge", run, "--model", tmp_path / "other", "--output_dir", tmp_path / "merged")
    assert code == 2 and "base" in errors and not (tmp_path / "merged").exists()


def test_a_selection_never_replaces_the_report_it_was_made_from(run, tmp_path):
    report = tmp_path / "report.json"
    shutil.copy(run / "kappa_report.json", report)
    before = report.read_bytes()
    code, _, errors = kappatune("select", report, "--k", "3", "--output", report)
    assert code == 2 and "is no such file" in errors and report.read_bytes() == before


def test_the_home_folder_is_found_behind_an_equals_sign(saved_olmoe, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(saved_olmoe)
    code, out, _ = kappatune("scan", "~/model", "--k", "4", "--output=~/report.json", "--table", "full")
    assert code == 0 and sorted(path.name for path in tmp_path.iterdir()) == ["model", "report.json"]


def test_what_of_weights_is_no_report_stays(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    code, _, errors = kappatune("scan", tmp_path, "--k", "4", "--output", tmp_path / "model.safetensors")
    assert code == 2 and "is no such file" in errors and (tmp_path / "model.safetensors").read_bytes() == before


def test_an_export_is_measured_beside_its_adapter(run, tmp_path):
    words = ["export", run, "--as", "lora", "--config", run.parent / "recipe.yaml"]
    rows = {}
    for rank in (1, 32):
        code, out, errors = kappatune(*words, "--rank", rank, "--output_dir", tmp_path / str(rank))
        assert code == 0, errors
        rows[rank] = {
            cells[1].strip(): cells[2:5] for cells in (line.split("│") for line in out.splitlines()) if cells[4:]
        }
    measured = json.loads((run / "forgetting.json").read_text())["control"]["control"]
    base, adapter, full = rows[32]["control: loss a token (nats)"]
    assert float(base) == pytest.approx(measured["loss_before"], abs=6e-4)
    assert float(adapter.split()[0]) == pytest.approx(measured["loss_after"], abs=6e-4)
    assert adapter.strip() == full.strip() != rows[1]["control: loss a token (nats)"][2].strip()
    assert any("accuracy" in row for row in rows[1])


def test_an_export_with_a_recipe_that_measures_nothing_writes_nothing(run, tmp_path):
    base = json.loads((run / "adapter_config.json").read_text())["base_model_name_or_path"]
    path = write_recipe(tmp_path / "recipe.yaml", tiny_recipe(tmp_path, base, forgetting=None))
    code, _, errors = kappatune("export", run, "--as", "lora", "--config", path, "--output_dir", tmp_path / "lora")
    assert code == 2 and "the block forgetting is missing" in errors
    assert not (tmp_path / "lora").exists()
