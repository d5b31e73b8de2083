"""What the ranks of the distributed tests do. Imported once by the process that they are forked from."""

import gc
import importlib
import importlib.util
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist
import transformers.training_args
from accelerate import DistributedType, PartialState
from datasets import Dataset
from packaging.version import Version
from peft import get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import AutoModelForCausalLM, AutoProcessor
from transformers.integrations import HfDeepSpeedConfig
from trl import SFTConfig, SFTTrainer

import kappatune_plugin
from helpers.recipes import known
from helpers.tiny import tiny_model, tiny_tokenizer
from kappatune_plugin import KappaTuneConfig, KappaTuneError
from kappatune_plugin.data.replay import ReplayConfig
from kappatune_plugin.distributed import lost_ranks as watch
from kappatune_plugin.distributed import ranks, shards
from kappatune_plugin.run import replay
from kappatune_plugin.scanning import measure
from kappatune_plugin.speech.collator import SpeechCollator
from kappatune_plugin.tuner.values import VALUES
from kappatune_plugin.weights import model_source as sources
from kappatune_plugin.weights import open_source
from kappatune_plugin.weights.fused_experts import quantize_experts

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
OLD_DEEPSPEED = HAS_DEEPSPEED and Version(version("deepspeed")) < Version("0.19.8")

if HAS_DEEPSPEED:
    import deepspeed

    # on the CPU it would compile an extension of its own first, minutes where two cores are busy; gloo does.
    # The attribute `torch` of deepspeed.comm is torch itself
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None

# asked where use_cpu is off, as DeepSpeed and FSDP2 want it
transformers.training_args.is_torch_bf16_gpu_available = lambda: True

TEXTS = [f"the cat {i} sat on the mat {j} times" for i in range(8) for j in range(4)]


def zero(stage: int, **settings: Any) -> dict[str, Any]:
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": stage,
            "stage3_gather_16bit_weights_on_model_save": True,
            "stage3_param_persistence_threshold": 0,
            # where it gathers several at once, it loses weights now and then over gloo
            **({"stage3_allgather_sequential": True} if OLD_DEEPSPEED else {}),
            **settings,
        },
    }


# every weight of this small model stays whole beside its parts
KEPT = {"stage3_param_persistence_threshold": 10**6}
OFFLOAD = {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}


def mode_settings(mode: str) -> dict[str, Any]:
    """SFTConfig's settings for `mode`, and the state that accelerate needs for it on a machine without a GPU."""
    if mode.startswith("zero"):
        # without a GPU accelerate picks no backend for DeepSpeed
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        PartialState(backend="gloo")
        del os.environ["ACCELERATE_USE_DEEPSPEED"]
        config = zero(int(mode[4]), **(OFFLOAD if "offload" in mode else {}), **(KEPT if "kept" in mode else {}))
        # DeepSpeed's own Adam for the CPU would have to be compiled first
        config["zero_force_ds_cpu_optimizer"] = False
        return {"deepspeed": config, "accelerator_config": {"use_configured_state": True}}
    if mode.startswith("fsdp2"):
        PartialState(cpu=True, backend="gloo")
        # without a GPU accelerate knows no FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        os.environ["ACCELERATE_USE_FSDP"] = "true"
        if "offload" in mode:
            # what is offloaded gets pinned for copies to a GPU, which takes one
            torch.Tensor.pin_memory = lambda tensor, *given: tensor
        config = {
            "version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "reshard_after_forward": True,
            "cpu_ram_efficient_loading": "first_rank_loads" in mode,
            "cpu_offload": "offload" in mode,
            "state_dict_type": "FULL_STATE_DICT",
        }
        return {"fsdp": True, "fsdp_config": config, "accelerator_config": {"use_configured_state": True}}
    return {"use_cpu": True}


def make_trainer(
    mode: str, model: str, output: str, config: dict[str, Any], recordings: list[Any] | None = None, **settings: Any
) -> SFTTrainer:
    """Of texts, or with `recordings` (rows as `speech_rows` gives them) of a speech model."""
    if recordings is None:
        data = {"train_dataset": Dataset.from_dict({"text": TEXTS}), "processing_class": tiny_tokenizer()}
    else:
        collator = SpeechCollator.build(AutoProcessor.from_pretrained(model), "Say: <|AUDIO|>")
        data = {"train_dataset": Dataset.from_list(recordings), "processing_class": collator.processor}
        data["data_collator"] = collator
        settings = {"remove_unused_columns": False, "dataset_kwargs": {"skip_prepare_dataset": True}, **settings}
    arguments = {
        "output_dir": output,
        "bf16": False,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "max_grad_norm": 0.05,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **known(SFTConfig, router_aux_loss_coef=0.0),
        "model_init_kwargs": {"dtype": "float32"},
        **settings,
        **mode_settings(mode),
    }
    return SFTTrainer(model, args=SFTConfig(**arguments), peft_config=KappaTuneConfig(**config), **data)


def whole_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter of the base model, whole, under its name; collective."""
    from kappatune_plugin.distributed.shards import whole_block

    return {name: whole_block(value, ()).clone() for name, value in model.named_parameters() if "kappatune" not in name}


def train(
    mode: str, model: str, output: str, config: dict[str, Any], resume: str | None = None, **settings: Any
) -> dict[str, Any]:
    # low-rank pairs begin at random numbers
    torch.manual_seed(0)
    one = make_trainer(mode, model, output, config, **settings)
    one.train(resume_from_checkpoint=resume)
    base = one.accelerator.unwrap_model(one.model).get_base_model()
    weights = whole_weights(base)
    one.save_model(output)
    log = one.state.log_history
    return {
        "losses": [entry["loss"] for entry in log if "loss" in entry],
        "norms": [float(entry["grad_norm"]) for entry in log if "grad_norm" in entry],
        "weights": weights if ranks.rank() == 0 else None,
    }


def zero3_without_trainer() -> dict[str, Any]:
    """ZeRO-3 with the numbers in it that a Trainer would fill in."""
    config = {**zero(3), "train_batch_size": dist.get_world_size(), "train_micro_batch_size_per_gpu": 1}
    return {**config, "gradient_accumulation_steps": 1, "gradient_clipping": 0.0, "bf16": {"enabled": False}}


def load_divided(mode: str, model: str, dtype: torch.dtype = torch.float32) -> Any:
    """The model whole ("ddp"), partitioned while it is loaded ("zero3"), or sharded layer by layer ("fsdp2")."""
    dist.init_process_group("gloo")
    if mode == "zero3":
        deepspeed.init_distributed("gloo")
        load_divided.kept = HfDeepSpeedConfig(zero3_without_trainer())
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    if mode == "fsdp2":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in loaded.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(loaded, mesh=mesh)
    return loaded


def scan_divided(mode: str, model: str, from_disk: bool) -> tuple[str, list[str], bool]:
    """The report as JSON, the names that this rank measured, and whether any weight was gathered."""
    measured, gathered = [], []
    real_row, real_whole = measure._row, shards.whole_block
    measure._row = lambda unit, *given: measured.append(unit.name) or real_row(unit, *given)
    shards.whole_block = lambda *given: gathered.append(given) or real_whole(*given)
    loaded = load_divided(mode, model)
    if not from_disk:
        open_source.same_on_disk = lambda model, source: None
    report = kappatune_plugin.scan(loaded, progress=False, cache=False)
    return json.dumps(asdict(report)), measured, bool(gathered)


def merge_not_finite(mode: str, model: str, output: str, config: dict[str, Any]) -> str:
    """The error of merging where the last rank's part of the values has a NaN."""
    one = make_trainer(mode, model, output, config, max_steps=1)
    one.train()
    tuned = one.accelerator.unwrap_model(one.model)
    masters = [value for name, value in tuned.named_parameters() if VALUES in name]
    assert all(shards.is_partitioned(value) for value in masters)
    held = masters[0].ds_tensor if mode == "zero3" else masters[0].to_local()
    if ranks.rank() == ranks.world() - 1:
        held.data[0] = float("nan")
    error = error_of(lambda: tuned.merge_and_unload(safe_merge=True))[0]
    held.data.nan_to_num_()
    assert list(tuned.merge_and_unload(safe_merge=True).parameters())
    return error


def plain_deepspeed(stage: int, model: str) -> tuple[str, list[float]]:
    """A loop without a Trainer: the error of one that doesn't write through, and the losses of one that does."""
    dist.init_process_group("gloo")
    deepspeed.init_distributed("gloo")
    settings = {**zero3_without_trainer(), "zero_optimization": zero(stage)["zero_optimization"]}
    kept = HfDeepSpeedConfig(settings)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tuned = get_peft_model(loaded, KappaTuneConfig(k=7))
    trained = [value for value in tuned.parameters() if value.requires_grad]
    options = {"config": kept.config, "optimizer": torch.optim.AdamW(trained, lr=1e-2)}
    engine, *_ = deepspeed.initialize(model=tuned, model_parameters=trained, **options)
    batch = torch.arange(3, 35).reshape(2, 16)

    def step() -> float:
        loss = engine(input_ids=batch, labels=batch).loss
        engine.backward(loss)
        engine.step()
        return loss.item()

    step()
    error, _ = error_of(step)
    losses = []
    for _ in range(4):
        tuned.base_model.write_through()
        losses.append(step())
    return error, losses


def placed_by_columns() -> str:
    """The error for a weight that isn't divided along its first axis."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    layer = torch.nn.Linear(8, 6, bias=False)
    layer.weight = torch.nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(1)]))
    return error_of(lambda: get_peft_model(layer, KappaTuneConfig(k=1)))[0]


def train_lost(mode: str, model: str) -> str:
    """The error of training where the last rank's part of one parameter was not loaded."""
    loaded = load_divided(mode, model)
    if ranks.rank() == ranks.world() - 1:
        parameter = loaded.model.layers[1].mlp.experts.gate_up_proj
        held = parameter.ds_tensor if mode == "zero3" else parameter.to_local()
        held.data.normal_()
    return error_of(lambda: get_peft_model(loaded, KappaTuneConfig(k=7)))[0]


def die(count: int, rank: int, real: Callable[..., Any]) -> Callable[..., Any]:
    """`real`, but for its call number `count` on `rank`: kill -9."""
    calls = []

    def dying(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == count and ranks.rank() == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    return dying


def error_of(job: Callable[[], Any]) -> tuple[str, float]:
    """The KappaTuneError that `job` ends with, and after how many seconds."""
    start = time.monotonic()
    try:
        job()
    except KappaTuneError as error:
        return str(error), time.monotonic() - start
    raise AssertionError("it ended without an error")


def scan_until_killed(mode: str, model: str) -> tuple[str, float]:
    measure._row = die(5, 1, measure._row)
    loaded = load_divided(mode, model)
    return error_of(lambda: kappatune_plugin.scan(loaded, progress=False, cache=False))


def scan_with_an_error(mode: str, model: str) -> str:
    """What the scan ends with where one rank meets an error that no one foresaw."""

    def failing(unit: Any, *given: Any) -> Any:
        if ranks.rank() == 1:
            raise KeyError("no row")
        return real(unit, *given)

    real, measure._row = measure._row, failing
    loaded = load_divided(mode, model)
    try:
        kappatune_plugin.scan(loaded, progress=False, cache=False)
    except (KeyError, KappaTuneError) as error:
        return str(error)
    raise AssertionError("it ended without an error")


def save_until_killed(mode: str, model: str, output: str, config: dict[str, Any], **settings: Any) -> tuple[str, float]:
    one = make_trainer(mode, model, output, config, save_strategy="steps", save_steps=2, **settings)
    real = torch.save
    torch.save = lambda content, path, *rest, **named: (
        die(1, 1, real)(content, path, *rest, **named)
        if "checkpoint-4" in str(path)
        else real(content, path, *rest, **named)
    )

    def run() -> None:
        with watch.together("training", stop_stuck=False):
            one.train()

    return error_of(run)


def gather_peak(mode: str, rows: int, columns: int) -> tuple[float, list[float]]:
    """Bytes of one matrix, and the most that gathering for a scan ever held beside the parts on each rank.

    Counted are the storages of the tensors that exist whenever a matrix has been gathered and when one is handed out.
    """
    dist.init_process_group("gloo")
    stack = torch.nn.Sequential(*(torch.nn.Linear(columns, rows, bias=False) for _ in range(6)))
    if mode == "zero3":
        deepspeed.init_distributed("gloo")
        deepspeed.zero.Init(module=stack, config_dict_or_path=zero3_without_trainer(), dtype=torch.float32)
    else:
        fully_shard(stack, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))

    def held() -> int:
        gc.collect()
        tensors = [each for each in gc.get_objects() if isinstance(each, torch.Tensor) and not each.is_meta]
        parts = [each.to_local() if isinstance(each, DTensor) else each for each in tensors]
        return sum({part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in parts}.values())

    source = sources.ModelSource(stack)
    before = held()
    peaks = []
    real = dist.all_to_all_single
    dist.all_to_all_single = lambda *given: (real(*given), peaks.append(held() - before))[0]
    for _, load in source.work(source.units):
        peaks.append(held() - before)
        del load
    return rows * columns * 4, peaks


def write_replay(model: str, output: str, cache: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Training with text that the base writes: its rows, how many batches this rank wrote, the losses."""
    os.environ["KAPPATUNE_CACHE"] = cache
    wrote, real = [], replay.sample_base
    replay.sample_base = lambda *given: wrote.append(given) or real(*given)
    one = make_trainer("ddp", model, output, {"k": 5, "task_type": "CAUSAL_LM"}, max_steps=2)
    replay.mix_replay(ReplayConfig(**settings), one, len(TEXTS))
    one.train()
    return {
        "rows": one.train_dataset["input_ids"][:],
        "batches": len(wrote),
        "losses": [entry["loss"] for entry in one.state.log_history if "loss" in entry],
    }


def train_packed_experts(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """What units inside experts in 4 bits are after three steps, each rank with its rows, in a loop with plain DDP."""
    state = PartialState(cpu=True, backend="gloo") if "RANK" in os.environ else None
    here = rows[state.process_index :: state.num_processes] if state else rows
    model = tiny_model("olmoe")
    quantize_experts(model, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})
    tuned = get_peft_model(model, KappaTuneConfig(k=8, include=["*.experts.*"], task_type="CAUSAL_LM"))
    runs = torch.nn.parallel.DistributedDataParallel(tuned) if state else tuned
    optimizer = torch.optim.AdamW([each for each in tuned.parameters() if each.requires_grad], lr=0.01)
    for _ in range(3):
        tokens = torch.tensor(here)
        runs(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {layer.unit.name: layer.active.whole() for layer in tuned.base_model.layers()}
