"""A recipe with the block `audio:`, from recordings to a merged checkpoint."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor

from helpers.command import kappatune
from helpers.recipes import tiny_recipe, write_recipe, write_rows
from helpers.speech import MODELS, save_speech, speech_model, write_recordings
from helpers.training import losses
from kappatune_plugin import KappaReport, KappaTuneError
from kappatune_plugin.export.export import export_adapter
from kappatune_plugin.export.merge import merge_adapter
from kappatune_plugin.recipe.recipe import load_recipe
from kappatune_plugin.recipe.speech import collator_of
from kappatune_plugin.run.evaluate import evaluate
from kappatune_plugin.run.train import run_sft
from kappatune_plugin.speech.recordings import speech_rows
from kappatune_plugin.tuner.adapter_folder import load_adapter
from kappatune_plugin.weights.load_model import load_model

TEXTS = [{"text": f"the cat {i} sat on the {word}, yes. no good mat"} for i in range(12) for word in ("mat", "rug")]
PROJECTOR = "multi_modal_projector"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A tiny Qwen2-Audio with its processor. Read only."""
    return save_speech(tmp_path_factory.mktemp("qwen2_audio"))


def recipe_in(folder: Path, model: Path, **changes):
    rows = write_recordings(folder / "sounds", 16)
    settings = {
        "kappatune": {"k": 5, "modules_to_save": [PROJECTOR]},
        "data": {
            "train": {"path": str(write_rows(folder / "heard.jsonl", rows))},
            "validation": {"path": str(write_rows(folder / "held.jsonl", rows[:6]))},
            "test": {"path": str(write_rows(folder / "heard_test.jsonl", rows[:4]))},
        },
        "audio": {"folder": "sounds", "prompt": "Say: <|AUDIO|>", "max_new_tokens": 4},
        "forgetting": {"control": {"path": str(write_rows(folder / "texts.jsonl", TEXTS))}},
        **changes,
    }
    return load_recipe(write_recipe(folder / "recipe.yaml", tiny_recipe(folder, model, **settings)))


def loaded(folder: Path) -> torch.nn.Module:
    return load_model(str(folder)).eval()


def test_a_run_hears_saves_and_merges(saved, tmp_path, capsys):
    recipe = recipe_in(tmp_path, saved, learning_rate="3e-2", max_steps=30)
    assert recipe.training_args.remove_unused_columns is False
    result = run_sft(recipe)
    # below the table, and in the sentence that counts
    assert " ".join(capsys.readouterr().out.split()).count("(include: [tower] ranks it)") == 2
    found = losses(result.trainer)
    assert sum(found[-3:]) < 0.5 * sum(found[:3])
    names = [unit.name for unit in result.selection.units]
    assert len(names) == 5 and all("language_model" in name for name in names)
    content = json.loads((result.output_dir / "forgetting.json").read_text())
    task = content["task"]
    assert task["metric"] == "wer" and task["examples"] == 4 and task["words"] == {"before": 4.0, "after": 4.0}
    for when in ("before", "after"):
        errors = sum(task[name][when] for name in ("substitutions", "deletions", "insertions"))
        assert task[when] == errors / 4
    assert task["after"] < task["before"]
    assert content["control"]["texts"]["loss_after"] != content["control"]["texts"]["loss_before"]
    heard = [json.loads(line) for line in (result.output_dir / "answers.jsonl").read_text().splitlines()]
    assert [row["said"] for row in heard] == [" yes", " no", " good", " bad"]

    found = evaluate(recipe, [str(result.output_dir)]).reports[str(result.output_dir)]
    assert found.after == pytest.approx(result.forgetting.after, rel=1e-4, abs=1e-6)
    rows = speech_rows(recipe_rows(tmp_path), recipe.audio, "rows", tmp_path)
    batch = collator_of(recipe)([rows[0], rows[1]])
    tuned = load_adapter(loaded(saved), result.output_dir).eval()
    merged = merge_adapter(result.output_dir, tmp_path / "merged")
    with torch.no_grad():
        of_run = result.trainer.model.eval()(**batch).logits
        assert torch.equal(tuned(**batch).logits, of_run)
        assert torch.allclose(loaded(merged)(**batch).logits, of_run, atol=1e-5)
        assert not torch.allclose(loaded(saved)(**batch).logits, of_run, atol=1e-2)
    AutoProcessor.from_pretrained(merged)


@pytest.mark.parametrize("kind", MODELS[1:])
def test_other_families_run_save_and_merge(kind, tmp_path):
    """With their own processors, from files and back: the projector and matrices of the language model, no others."""
    base, (_, _, prompt) = save_speech(tmp_path / "base", kind), speech_model(kind)
    projector = "projector" if kind == "granite_speech" else PROJECTOR
    how = {"kappatune": {"k": 5, "modules_to_save": [projector]}, "learning_rate": "1e-2", "max_steps": 2}
    audio = {"folder": "sounds", "prompt": prompt, "max_new_tokens": 2}
    recipe = recipe_in(tmp_path, base, audio=audio, per_device_train_batch_size=2, **how)
    result = run_sft(recipe)
    report = KappaReport.load(result.output_dir / "kappa_report.json")
    assert len(report.units) > 5 and all(".language_model." in f".{row.name}" for row in report.units)
    assert result.forgetting.after.keys() >= {"task_wer", "task_cer", "texts_loss"}
    batch = collator_of(recipe)(speech_rows(recipe_rows(tmp_path), recipe.audio, "rows", tmp_path).to_list()[:2])
    before, tuned = loaded(base), load_adapter(loaded(base), result.output_dir).eval()
    merged = loaded(merge_adapter(result.output_dir, tmp_path / "merged"))
    with torch.no_grad():
        of_run = result.trainer.model.eval()(**batch).logits
        assert torch.equal(tuned(**batch).logits, of_run) and torch.equal(merged(**batch).logits, of_run)
    then, now = before.state_dict(), merged.state_dict()
    changed = {name for name in then if not torch.equal(then[name], now[name])}
    chosen = {f"model.{unit.name.replace('.model.', '.')}" for unit in result.selection.units}
    assert chosen < changed and all(f".{projector}." in name for name in changed - chosen)


def recipe_rows(folder: Path):
    from kappatune_plugin.data.rows import load_rows

    return load_rows({"path": str(folder / "heard_test.jsonl")}, "rows")


def test_the_dial_keeps_its_limit_on_text(saved, tmp_path):
    recipe = recipe_in(
        tmp_path,
        saved,
        learning_rate="3e-2",
        max_steps=8,
        forgetting={
            "control": "self",
            "samples": 22,
            "max_length": 16,
            "batch_size": 32,
            "max_delta": 0.05,
            "interpolate": "one",
        },
    )
    result = run_sft(recipe)
    report = result.forgetting
    assert report.delta(report.after) > 0.05 >= report.delta(report.kept)
    assert result.dialed.verified["self"].upper <= 0.05 and "task_wer" in report.kept


def test_what_does_not_go_beside_audio_is_said_at_once(saved, tmp_path):
    with pytest.raises(KappaTuneError) as found:
        recipe_in(
            tmp_path,
            saved,
            packing=True,
            remove_unused_columns=True,
            data={"train": "rows.jsonl", "prompt": "{text}", "completion": "{text}", "end_token": False},
        )
    for words in (
        "data.prompt, data.completion, data.end_token: for rows of text",
        "packing, padding_free: recordings can't be packed",
        "remove_unused_columns: true would remove the recordings",
    ):
        assert words in str(found.value)
    with pytest.raises(KappaTuneError, match="audio.prompt is missing. Write `prompt: "):
        recipe_in(tmp_path, saved, audio={})
    with pytest.raises(KappaTuneError, match="audio.normalizer: 'german' is none of english, basic, none"):
        recipe_in(tmp_path, saved, audio={"prompt": "<|AUDIO|>", "normalizer": "german"})


def test_a_text_model_and_missing_files_are_said_before_training(saved, saved_olmoe, tmp_path):
    recipe = recipe_in(tmp_path, saved_olmoe, forgetting=None, kappatune={"k": 5})
    with pytest.raises(KappaTuneError, match="takes no recordings"):
        run_sft(recipe)
    (tmp_path / "sounds" / "3.flac").unlink()
    with pytest.raises(KappaTuneError, match=r"data.train, row 3: there is no file '.*3.flac'"):
        run_sft(recipe)


def test_stage_one_trains_the_projector_alone(saved, tmp_path):
    recipe = recipe_in(tmp_path, saved, learning_rate="3e-2", kappatune={"k": 0, "modules_to_save": [PROJECTOR]})
    result = run_sft(recipe)
    assert result.selection.units == []
    trained = [name for name, each in result.trainer.model.named_parameters() if each.requires_grad]
    assert trained and all(f".{PROJECTOR}." in name for name in trained)
    stored = load_file(result.output_dir / "adapter_model.safetensors")
    assert stored and all(f".{PROJECTOR}." in name for name in stored)
    rows = speech_rows(recipe_rows(tmp_path), recipe.audio, "rows", tmp_path)
    batch = collator_of(recipe)([rows[0], rows[1]])
    before, tuned = loaded(saved).state_dict(), load_adapter(loaded(saved), result.output_dir).eval()
    merged = loaded(merge_adapter(result.output_dir, tmp_path / "merged"))
    export_adapter(result.output_dir, tmp_path / "patch", "patch")
    assert set(load_file(tmp_path / "patch" / "model-patch.safetensors")) == {
        name for name in load_file(saved / "model.safetensors") if PROJECTOR in name
    }
    found = evaluate(recipe, [str(result.output_dir)]).reports[str(result.output_dir)]
    assert found.after == pytest.approx(result.forgetting.after, rel=1e-4, abs=1e-6)
    with torch.no_grad():
        of_run = result.trainer.model.eval()(**batch).logits
        assert torch.equal(tuned(**batch).logits, of_run) and torch.equal(merged(**batch).logits, of_run)
    changed = {name for name, value in merged.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if PROJECTOR in name}
    card = (result.output_dir / "README.md").read_text()
    assert f"KappaTune trained {PROJECTOR} whole and no other weight" in card


def test_stage_one_resumes_to_the_bit(saved, tmp_path):
    """Trained on from its second step, the projector and every loss are those of the run that nothing interrupted."""
    beside = {"kappatune": {"k": 0, "modules_to_save": [PROJECTOR]}, "save_strategy": "steps", "save_steps": 2}
    whole, resumed = (
        run_sft(recipe_in(tmp_path / name, saved, learning_rate="3e-2", forgetting=None, **beside, **how))
        for name, how in (("whole", {}), ("resumed", {"resume_from_checkpoint": f"{tmp_path}/whole/out/checkpoint-2"}))
    )
    assert len(losses(whole.trainer)) == 4 and losses(resumed.trainer) == losses(whole.trainer)
    at_two, one, other = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (whole.output_dir / "checkpoint-2", whole.output_dir, resumed.output_dir)
    )
    assert one.keys() == other.keys() and all(torch.equal(other[name], one[name]) for name in one)
    assert not any(torch.equal(at_two[name], one[name]) for name in one)


@pytest.mark.parametrize("k", [0, "0", "00"])
def test_no_matrix_and_nothing_beside_it_is_a_mistake(saved, tmp_path, k):
    with pytest.raises(KappaTuneError, match=r"k: 0 trains no matrix, and modules_to_save names nothing else: name a"):
        recipe_in(tmp_path, saved, kappatune={"k": k})


def test_a_finished_run_is_scaled_back_later(saved, tmp_path):
    texts = {"control": "self", "samples": 22, "max_length": 16, "batch_size": 32}
    recipe = recipe_in(tmp_path, saved, learning_rate="3e-2", max_steps=8, forgetting=texts)
    run = run_sft(recipe)
    trained = run.forgetting
    assert trained.delta(trained.after) > 0.05 and not trained.kept
    words = ["interpolate", run.output_dir, "--config", tmp_path / "recipe.yaml", "--max_delta", 0.05, "--one"]
    code, said, errors = kappatune(*words, "--output_dir", tmp_path / "kept")
    assert code == 0, errors
    found = json.loads((tmp_path / "kept" / "interpolation.json").read_text())
    (alpha,) = set(found["alphas"].values())
    assert 0 < alpha < 1 and found["verified"]["self"]["upper"] <= 0.05
    before = loaded(saved).state_dict()
    whole, kept = (
        load_adapter(loaded(saved), folder).merge_and_unload().state_dict()
        for folder in (run.output_dir, tmp_path / "kept")
    )
    moved = {name for name in before if not torch.equal(whole[name], before[name])}
    assert any(PROJECTOR in name for name in moved) and any("language_model" in name for name in moved)
    for name in before:
        torch.testing.assert_close(kept[name], before[name] + alpha * (whole[name] - before[name]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("command", [["compare", "--methods", "lowest,random"], ["sweep", "--k", "2,4"]])
def test_a_comparison_of_recordings_is_refused_before_any_work(saved, tmp_path, command):
    recipe_in(tmp_path, saved, kappatune={"k": 5})
    code, _, errors = kappatune(*command, "--config", tmp_path / "recipe.yaml", "--output_dir", tmp_path / "study")
    assert code == 2 and "audio: a comparison measures tasks of text" in errors
    assert not (tmp_path / "study").exists() or not list((tmp_path / "study").iterdir())


@pytest.mark.parametrize("stage", ["stage 1", "llama_asr", "llama_asr_highest"])
def test_the_papers_recipes_run_on_a_small_model(saved, tmp_path, stage):
    sounds = write_recordings(tmp_path / "sounds", 8)
    heard = write_rows(tmp_path / "heard.jsonl", sounds)
    texts = write_rows(tmp_path / "texts.jsonl", TEXTS)
    here = {
        "model_name_or_path": saved,
        "output_dir": tmp_path / "out",
        **{"dtype": "float32", "use_cpu": True, "bf16": False, "disable_tqdm": True, "report_to": "none"},
        **{"max_steps": 2, "kappatune.k": 0 if stage == "stage 1" else 5},
        "data": {"train": {"path": str(heard)}, "test": {"path": str(heard)}},
        "audio.folder": tmp_path / "sounds",
        "audio.max_new_tokens": 4,
        "forgetting.control": {"path": str(texts)},
    }
    words = [
        word
        for key, value in here.items()
        for word in (f"--{key}", json.dumps(value) if isinstance(value, dict) else str(value))
    ]
    name = "llama_asr" if stage == "stage 1" else stage
    result = run_sft(load_recipe(Path(__file__).parents[2] / "recipes" / f"{name}.yaml", words))
    assert len(result.selection.units) == here["kappatune.k"]
    assert result.selection.order == ("highest" if stage == "llama_asr_highest" else "lowest")
    assert any(PROJECTOR in key for key in load_file(result.output_dir / "adapter_model.safetensors"))
    assert result.forgetting.after.keys() >= {"task_wer", "task_cer"}
