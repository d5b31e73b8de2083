"""The tuner through an unmodified SFTTrainer on several ranks, against one process with the same batches."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from helpers.quantize import needs_bitsandbytes
from helpers.rank_jobs import (
    HAS_DEEPSPEED,
    OLD_DEEPSPEED,
    merge_not_finite,
    plain_deepspeed,
    train,
    train_packed_experts,
)
from helpers.ranks import run_ranks
from helpers.tiny import tiny_model
from kappatune_plugin import Selection, scan, select
from kappatune_plugin.run.resume import checkpoint_problems

# DeepSpeed without this package does so too
needs_newer = pytest.mark.skipif(
    OLD_DEEPSPEED,
    reason="over gloo, ZeRO-1 and 2 of DeepSpeed before 0.19.8 don't run with this torch, and 3 loses weights",
)
needs_deepspeed = pytest.mark.skipif(not HAS_DEEPSPEED, reason="deepspeed isn't installed")
REENTRANT = {"gradient_checkpointing_kwargs": {"use_reentrant": True}}
NOT_REENTRANT = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
BFLOAT16 = {"bf16": True, "model_init_kwargs": {"dtype": "bfloat16"}}


@pytest.fixture(scope="module")
def selection(saved_olmoe) -> Selection:
    """Linear units, a router's, and slices of both fused parameters, some of one expert."""
    model = AutoModelForCausalLM.from_pretrained(saved_olmoe, dtype=torch.float32)
    chosen = select(scan(model, progress=False), k=14, order="random", seed=3)
    kinds = {row.name.split(".")[-2] for row in chosen.units}
    assert kinds >= {"gate_proj", "up_proj", "down_proj", "gate"} and kinds & {"q_proj", "k_proj", "v_proj", "o_proj"}
    return chosen


@pytest.fixture(scope="module")
def one_process(saved_olmoe, selection, tmp_path_factory):
    """What one process gives with the batches of all ranks."""
    done = {}

    def run(world: int = 2, config: dict | None = None, **settings):
        key = world, str(settings), str(config)
        if key not in done:
            output = str(tmp_path_factory.mktemp("one"))
            settings = {"per_device_train_batch_size": 2 * world, **settings}
            config = {"selection": selection.to_dict(), **(config or {})}
            done[key] = train("one", str(saved_olmoe), output, config, **settings)
        return done[key]

    return run


def on_ranks(
    mode: str,
    model: Path,
    output: Path,
    selection: Selection,
    world: int = 2,
    config: dict | None = None,
    **settings,
) -> dict:
    config = {"selection": selection.to_dict(), **(config or {})}
    arguments = {"mode": mode, "model": str(model), "output": str(output), "config": config}
    return run_ranks(train, world, **arguments, **settings)[0]


def assert_equal(found: dict, expected: dict) -> None:
    """To 1e-6, losses and every weight of the model; clipping was on, and changed the step."""
    assert min(expected["norms"]) > 0.05
    assert found["losses"] == pytest.approx(expected["losses"], abs=1e-6)
    assert found["norms"] == pytest.approx(expected["norms"], abs=1e-6)
    for name, value in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], value, rtol=0, atol=1e-6)


def assert_saved(base: Path, adapter: Path, found: dict) -> None:
    """The adapter, loaded by one process, gives the weights that the ranks trained."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    for name, value in merged.named_parameters():
        torch.testing.assert_close(value, found["weights"][name], rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["ddp", "fsdp2", "fsdp2_first_rank_loads"])
def test_without_deepspeed(mode, saved_olmoe, tmp_path, selection, one_process):
    found = on_ranks(mode, saved_olmoe, tmp_path, selection)
    assert_equal(found, one_process())
    assert_saved(saved_olmoe, tmp_path, found)


@needs_bitsandbytes
@pytest.mark.distributed
def test_experts_in_four_bits_under_ddp():
    rows = torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(0)).tolist()
    expected = train_packed_experts(rows)
    for found in run_ranks(train_packed_experts, rows=rows):
        assert found.keys() == expected.keys() and len(expected) == 8
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5)


@needs_deepspeed
@pytest.mark.parametrize("mode", [pytest.param("zero2", marks=needs_newer), "zero3"])
def test_with_deepspeed(mode, saved_olmoe, tmp_path, selection, one_process):
    found = on_ranks(mode, saved_olmoe, tmp_path, selection)
    assert_equal(found, one_process())
    assert_saved(saved_olmoe, tmp_path, found)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("mode", "settings"),
    [
        ("ddp", {**REENTRANT, "ddp_find_unused_parameters": False}),
        ("fsdp2", REENTRANT),
        ("fsdp2_offload", {}),
        *[pytest.param("zero1", each, marks=needs_deepspeed) for each in ({}, REENTRANT)],
        *[pytest.param("zero2", each, marks=needs_deepspeed) for each in (REENTRANT,)],
        *[pytest.param("zero3", each, marks=needs_deepspeed) for each in ({"gradient_checkpointing": False},)],
        *[pytest.param(mode, {}, marks=needs_deepspeed) for mode in ("zero2_offload", "zero3_offload", "zero3_kept")],
    ],
    ids=str,
)
def test_more_modes(mode, settings, saved_olmoe, tmp_path, selection, one_process):
    found = on_ranks(mode, saved_olmoe, tmp_path, selection, **settings)
    assert_equal(found, one_process())
    assert_saved(saved_olmoe, tmp_path, found)


@pytest.mark.parametrize(
    "mode",
    [
        "ddp",
        pytest.param("fsdp2", marks=pytest.mark.distributed),
        *[pytest.param(f"zero{stage}", marks=[needs_deepspeed, pytest.mark.distributed]) for stage in (2, 3)],
    ],
)
def test_pairs(mode, saved_olmoe, tmp_path, selection, one_process):
    pairs = {"adapter": "lora", "r": 2, "lora_alpha": 8}
    found = on_ranks(mode, saved_olmoe, tmp_path, selection, config=pairs)
    assert_equal(found, one_process(config=pairs))
    assert_saved(saved_olmoe, tmp_path, found)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "mode", ["ddp", "fsdp2", *[pytest.param(f"zero{stage}", marks=needs_deepspeed) for stage in (1, 2, 3)]]
)
def test_resuming(mode, saved_olmoe, tmp_path, selection):
    """On as many ranks to the bit; on another number it works or says why not; another selection never."""
    folder = str(tmp_path / "run" / "checkpoint-2")
    settings = {"save_strategy": "steps", "save_steps": 2}
    whole = on_ranks(mode, saved_olmoe, tmp_path / "run", selection, **settings)
    problems = " ".join(checkpoint_problems(Path(folder)))
    assert (
        problems.startswith("DeepSpeed saved it on 2 ranks and can't load it on 1") if "zero" in mode else not problems
    )
    resumed = on_ranks(mode, saved_olmoe, tmp_path / "resumed", selection, resume=folder)
    assert resumed["losses"] == whole["losses"]
    assert all(torch.equal(resumed["weights"][name], value) for name, value in whole["weights"].items())
    alone = {"world": 1, "per_device_train_batch_size": 4, "resume": folder}
    if mode.startswith("zero"):
        with pytest.raises(AssertionError, match="used a DP world size of 2 but the current world size is 1"):
            on_ranks(mode, saved_olmoe, tmp_path / "alone", selection, **alone)
    else:
        assert_equal(on_ranks(mode, saved_olmoe, tmp_path / "alone", selection, **alone), whole)
    model = AutoModelForCausalLM.from_pretrained(saved_olmoe, dtype=torch.float32)
    other = select(scan(model, progress=False), k=14, order="random", seed=4)
    with pytest.raises(AssertionError, match="KappaTuneError: The .* another selection"):
        on_ranks(mode, saved_olmoe, tmp_path / "other", other, resume=folder)


@pytest.mark.distributed
@pytest.mark.parametrize("mode", ["ddp", "fsdp2", pytest.param("zero3", marks=needs_deepspeed)])
def test_four_ranks(mode, saved_olmoe, tmp_path, selection, one_process):
    settings = {"per_device_train_batch_size": 1}
    found = on_ranks(mode, saved_olmoe, tmp_path, selection, world=4, **settings)
    assert_equal(found, one_process(per_device_train_batch_size=4))


@pytest.mark.distributed
@pytest.mark.parametrize(
    "mode", ["ddp", "fsdp2", *[pytest.param(f"zero{stage}", marks=needs_deepspeed) for stage in (1, 2, 3)]]
)
def test_bfloat16(mode, saved_olmoe, tmp_path, selection, one_process):
    """Gradients are rounded to bfloat16 before they are added up, here a rank and there a batch at a time.

    AdamW's first steps have the gradient's sign and the size of the learning rate, so where rounding changes a sign a
    weight ends as far away as the learning rates of all steps allow (2.5e-2, twice). That is rare: on the average over
    all selected weights the distance stays below a tenth of one step.
    """
    expected = one_process(**BFLOAT16)
    found = on_ranks(mode, saved_olmoe, tmp_path, selection, **BFLOAT16)
    assert found["losses"] == pytest.approx(expected["losses"], abs=2e-2)
    before = AutoModelForCausalLM.from_pretrained(saved_olmoe, dtype=torch.bfloat16).state_dict()
    moved = distance = count = 0
    for name, value in expected["weights"].items():
        difference = (found["weights"][name].float() - value.float()).abs()
        changed = value != before[name]
        assert difference.max() <= 5.5e-2 and not difference[~changed].gt(1e-2).any()
        moved, distance, count = moved + changed.sum(), distance + difference.sum(), count + changed.sum()
    assert distance / count < 1e-3


def test_reentrant_checkpointing_under_ddp_is_an_error_that_says_what_to_write(saved_olmoe, tmp_path, selection):
    with pytest.raises(AssertionError, match="KappaTuneError: Re-entrant .*ddp_find_unused_parameters: false"):
        on_ranks("ddp", saved_olmoe, tmp_path, selection, **REENTRANT)


@needs_deepspeed
@needs_newer
@pytest.mark.parametrize("stage", [2, 3])
def test_a_plain_deepspeed_loop_has_to_write_through(stage, saved_olmoe):
    for error, losses in run_ranks(plain_deepspeed, stage=stage, model=str(saved_olmoe)):
        assert "Call model.base_model.write_through() after each step, on all ranks" in error
        assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.03


@pytest.mark.distributed
@pytest.mark.parametrize("mode", ["fsdp2", pytest.param("zero3", marks=needs_deepspeed)])
def test_a_safe_merge_looks_at_all_parts(mode, saved_olmoe, tmp_path, selection):
    config = {"selection": selection.to_dict()}
    arguments = {"mode": mode, "model": str(saved_olmoe), "output": str(tmp_path), "config": config}
    for error in run_ranks(merge_not_finite, **arguments):
        assert "of adapter 'default' has values that aren't finite: not merged" in error


@pytest.fixture(scope="module")
def tied_olmoe(saved_olmoe, tmp_path_factory) -> Path:
    """Its output head is its embedding."""
    folder = tmp_path_factory.mktemp("tied")
    tiny_model("olmoe", vocab_size=300, tie_word_embeddings=True).save_pretrained(folder)
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "mode", ["ddp", "fsdp2", *[pytest.param(f"zero{stage}", marks=needs_deepspeed) for stage in (1, 2, 3)]]
)
def test_the_output_head(mode, tied, saved_olmoe, tied_olmoe, tmp_path):
    """TRL reads its weight from outside, where a divided one isn't whole."""
    base = tied_olmoe if tied else saved_olmoe
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    head = select(scan(model, include=["head"], exclude=(), progress=False), k=1)
    if mode in ("zero3", "fsdp2"):
        with pytest.raises(AssertionError, match="KappaTuneError: The output head is selected and divided over ranks"):
            on_ranks(mode, base, tmp_path, head)
        return
    found = on_ranks(mode, base, tmp_path, head)
    alone = {"mode": "one", "model": str(base), "output": str(tmp_path / "one")}
    expected = train(**alone, config={"selection": head.to_dict()}, per_device_train_batch_size=4)
    assert expected["losses"][-1] < expected["losses"][0]
    assert_equal(found, expected)
