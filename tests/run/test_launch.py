"""`kappatune sft` through the launchers: several processes, and two hosts that are two network namespaces."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import accelerate.commands.launch
import pytest
import torch
from accelerate.commands.config import config_args
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trl import SFTConfig
from typer.testing import CliRunner

from helpers.ranks import ENVIRONMENT, free_port
from helpers.recipes import tiny_recipe, write_recipe
from kappatune_plugin import KappaTuneError
from kappatune_plugin.cli.app import app
from kappatune_plugin.distributed.ranks import LAUNCHED, is_launched
from kappatune_plugin.distributed.unsupported import fsdp_problem
from kappatune_plugin.recipe.launch_keys import split_words, warn_of_unused
from kappatune_plugin.recipe.recipe import load_recipe
from kappatune_plugin.run import launch as launch_module
from kappatune_plugin.run import train as train_module
from kappatune_plugin.run.launch import launch
from kappatune_plugin.run.train import run_sft

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed isn't installed")
NO_GPU = Path(__file__).parents[1] / "helpers" / "no_gpu"
RECIPES = Path(__file__).parents[2] / "recipes"
ADDRESSES = ("10.254.77.1", "10.254.77.2")


def test_a_shipped_configuration_by_its_name_and_accelerates_own_flags():
    words = ["--learning_rate", "1e-4", "--accelerate_config", "zero3", "--num_processes", "4", "--kappatune.k", "10%"]
    found, rest = split_words(words, {})
    assert found[0] == "--config_file" and found[1].endswith("zero3.yaml") and Path(found[1]).is_file()
    assert found[2:] == ["--num_processes", "4"]
    assert rest == ["--learning_rate", "1e-4", "--kappatune.k", "10%"]


def test_a_path_and_keys_of_the_recipe(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("distributed_type: 'NO'\n")
    found, rest = split_words(
        [f"--accelerate_config={path}"], {"accelerate_config": "zero3", "num_processes": 2, "env": {"A": "b"}}
    )
    assert found == ["--config_file", str(path), "--num_processes", "2"] and rest == []


def test_an_unknown_configuration_names_those_there_are():
    with pytest.raises(KappaTuneError, match="'zero4' is neither .*fsdp2.*zero2, zero3"):
        split_words(["--accelerate_config", "zero4"], {})
    with pytest.raises(KappaTuneError, match="'' is neither"):
        split_words(["--accelerate_config"], {})


@pytest.fixture
def no_launcher(monkeypatch) -> None:
    for name in ("LOCAL_RANK", "RANK", LAUNCHED):
        monkeypatch.delenv(name, raising=False)


def test_launch_keys_that_nobody_uses_are_said(no_launcher, saved_olmoe, tmp_path, monkeypatch, recwarn):
    recipe = tiny_recipe(tmp_path, saved_olmoe, accelerate_config="zero3", num_processes=2)
    path = write_recipe(tmp_path / "recipe.yaml", recipe)
    assert load_recipe(path, launches=True).kappatune.k == 7
    # in the processes that they started
    with monkeypatch.context() as context:
        context.setenv(LAUNCHED, "1")
        load_recipe(path)
    # torchrun's other ranks
    with monkeypatch.context() as context:
        context.setenv("RANK", "1")
        load_recipe(path)
    assert not [each for each in recwarn if "not used" in str(each.message)]
    with pytest.warns(UserWarning, match="accelerate_config, num_processes: not used, only `kappatune sft`"):
        load_recipe(path)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.warns(UserWarning, match="accelerate_config, num_processes: not used, a launcher has started"):
        warn_of_unused(recipe)


def test_accelerate_gets_the_command(no_launcher, monkeypatch):
    seen = []
    monkeypatch.setattr(accelerate.commands.launch, "launch_command", seen.append)
    # so that it is deleted after the test
    monkeypatch.setenv(LAUNCHED, "")
    launch(["--num_processes", "2"], ["sft", "--config", "r.yaml", "--seed", "1"])
    assert seen[0].num_processes == 2 and seen[0].module and seen[0].training_script == "kappatune_plugin"
    assert seen[0].training_script_args == ["sft", "--config", "r.yaml", "--seed", "1"]
    assert is_launched()


@pytest.fixture
def launched(no_launcher, monkeypatch, tmp_path) -> list:
    """What `kappatune sft` gives to the launcher, [] for a run in this process, which doesn't happen."""
    seen: list = []
    monkeypatch.setattr(launch_module, "launch", lambda *given: seen.extend(given))
    monkeypatch.setattr(train_module, "run_sft", lambda recipe: None)
    monkeypatch.setattr(config_args, "default_config_file", str(tmp_path / "default.yaml"))
    return seen


def sft(path: Path, *words: str) -> None:
    result = CliRunner().invoke(app, ["sft", "--config", str(path), *words])
    assert result.exit_code == 0, result.output


def test_sft_runs_on_all_gpus_as_trl_does(launched, saved_olmoe, tmp_path, monkeypatch):
    path = run_recipe(tmp_path, saved_olmoe)
    sft(path)
    assert launched == []
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 8)
    sft(path, "--seed", "1")
    # none of its flags: accelerate's defaults
    assert launched == [[], ["sft", "--config", str(path), "--seed", "1"]]


def test_sft_follows_what_accelerate_config_wrote(launched, saved_olmoe, tmp_path):
    (tmp_path / "default.yaml").touch()
    path = run_recipe(tmp_path, saved_olmoe)
    sft(path)
    assert launched == [[], ["sft", "--config", str(path)]]


@pytest.mark.parametrize(
    "changes",
    [
        {"use_cpu": True},
        {"kappatune": {"k": 7, "rank_by": "gain_over_forgetting", "order": "highest"}},
    ],
    ids=str,
)
def test_what_runs_in_one_process_is_not_launched(changes, launched, saved_olmoe, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 8)
    path = run_recipe(tmp_path, saved_olmoe, **changes)
    sft(path)
    assert launched == []
    sft(path, "--num_processes", "2")
    assert launched == [["--num_processes", "2"], ["sft", "--config", str(path)]]


def test_several_gpus_in_one_process_are_an_error_that_says_what_to_type(saved_olmoe, tmp_path, monkeypatch):
    monkeypatch.setattr(SFTConfig, "n_gpu", 8)
    recipe = load_recipe(run_recipe(tmp_path, saved_olmoe, use_cpu=True))
    with pytest.raises(KappaTuneError, match="sees 8 GPUs.*--num_processes 8.*CUDA_VISIBLE_DEVICES=0"):
        run_sft(recipe)


def test_fsdp_that_cant_run_here(saved_olmoe, tmp_path, monkeypatch):
    recipe = load_recipe(run_recipe(tmp_path, saved_olmoe, use_cpu=True))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with monkeypatch.context() as context:
        context.setenv("ACCELERATE_USE_FSDP", "true")
        context.setenv("FSDP_OFFLOAD_PARAMS", "true")
        with pytest.raises(KappaTuneError, match="use its second .`--accelerate_config fsdp2`"):
            run_sft(recipe)
        context.setenv("FSDP_VERSION", "2")
        with pytest.raises(KappaTuneError, match="FSDP2 offloads to the CPU from a GPU"):
            run_sft(recipe)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        assert fsdp_problem(recipe.training_args) is None
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    args = SimpleNamespace(fsdp=True, fsdp_config={"cpu_offload": True})
    assert "delete cpu_offload" in fsdp_problem(args)


@pytest.mark.slow
def test_one_process_is_launched_once(saved_olmoe, tmp_path):
    """accelerate tells one that runs alone nothing, and the recipe says again how many there are."""
    path = run_recipe(tmp_path, saved_olmoe, use_cpu=True, num_processes=1, mixed_precision="no")
    command = [sys.executable, "-m", "kappatune_plugin", "sft", "--config", str(path)]
    environment = {key: value for key, value in os.environ.items() if key not in ("LOCAL_RANK", LAUNCHED)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file() and "not used" not in done.stderr


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_the_deepspeed_configurations_are_json_of_their_stage(name):
    config = json.loads((RECIPES / "deepspeed" / f"{name}.json").read_text(encoding="utf-8"))
    assert config["zero_optimization"]["stage"] == int(name[-1])


def environment(**more: str) -> dict[str, str]:
    """For processes that run together on a machine without a GPU."""
    path = os.pathsep.join([str(NO_GPU), *filter(None, sys.path)])
    return {
        **os.environ,
        **ENVIRONMENT,
        "PYTHONPATH": path,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        **more,
    }


def run_recipe(folder: Path, model: Path, **changes: object) -> Path:
    folder.mkdir(exist_ok=True)
    settings = {"use_cpu": None, "forgetting": None, **changes}
    return write_recipe(folder / "recipe.yaml", tiny_recipe(folder, model, **settings))


def assert_trained(folder: Path, model: Path) -> None:
    """The adapter is complete, and `kappatune merge` makes a plain checkpoint of it."""
    steps = json.loads(next((folder / "out").glob("checkpoint-4/trainer_state.json")).read_text(encoding="utf-8"))
    losses = [entry["loss"] for entry in steps["log_history"] if "loss" in entry]
    assert len(losses) == 4 and losses[-1] < losses[0]
    words = ["merge", str(folder / "out"), "--output_dir", str(folder / "merged")]
    subprocess.run([sys.executable, "-m", "kappatune_plugin", *words], check=True, timeout=300)
    base = AutoModelForCausalLM.from_pretrained(model)
    merged = PeftModel.from_pretrained(base, folder / "out").merge_and_unload().state_dict()
    plain = AutoModelForCausalLM.from_pretrained(folder / "merged").state_dict()
    assert all(merged[name].equal(value) for name, value in plain.items())


def sft_on_two(recipe: Path, name: str, *more: str) -> subprocess.CompletedProcess:
    words = ["--accelerate_config", name, "--num_processes", "2", "--mixed_precision", "no", *more]
    words += ["--main_process_port", str(free_port())]
    command = [sys.executable, "-m", "kappatune_plugin", "sft", "--config", str(recipe), *words]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=500)


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["fsdp2", *[pytest.param(f"zero{n}", marks=needs_deepspeed) for n in (2, 3)]])
def test_accelerate_config(name, saved_olmoe, tmp_path):
    done = sft_on_two(run_recipe(tmp_path, saved_olmoe, save_strategy="steps", save_steps=4), name)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert_trained(tmp_path, saved_olmoe)


@pytest.mark.distributed
def test_divided_checkpoints_of_fsdp2(saved_olmoe, tmp_path):
    """SHARDED_STATE_DICT: the Trainer's checkpoints hold no adapter. The run's end does, and they can be resumed."""
    divided = ["--fsdp_state_dict_type", "SHARDED_STATE_DICT"]
    whole = run_recipe(tmp_path / "whole", saved_olmoe, save_strategy="steps", save_steps=2)
    done = sft_on_two(whole, "fsdp2", *divided)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert_trained(tmp_path / "whole", saved_olmoe)
    checkpoint = str(tmp_path / "whole" / "out" / "checkpoint-2")
    resumed = run_recipe(tmp_path / "resumed", saved_olmoe, resume_from_checkpoint=checkpoint)
    done = sft_on_two(resumed, "fsdp2", *divided)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    first, second = (load_file(tmp_path / name / "out" / "adapter_model.safetensors") for name in ("whole", "resumed"))
    assert all(second[name].equal(value) for name, value in first.items())
    done = sft_on_two(resumed, "fsdp2", *divided, "--kappatune.k", "6")
    assert done.returncode == 2 and "The checkpoint trains another selection than this run" in done.stderr


@pytest.fixture
def hosts() -> Iterator[list[list[str]]]:
    """Two network namespaces that reach each other and nothing else; for each what runs a command in it."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("needs root and the command `ip` to make network namespaces")
    names = [f"kappatune-{os.getpid()}-{number}" for number in (0, 1)]
    if subprocess.run(["ip", "netns", "add", names[0]], capture_output=True).returncode:
        pytest.skip("this machine makes no network namespaces")

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    try:
        ip("netns", "add", names[1])
        ends = [f"kt{os.getpid()}{letter}" for letter in "ab"]
        ip("-n", names[0], "link", "add", ends[0], "type", "veth", "peer", "name", ends[1], "netns", names[1])
        for name, end, address in zip(names, ends, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield [
            ["ip", "netns", "exec", name, "env", f"GLOO_SOCKET_IFNAME={end}"]
            for name, end in zip(names, ends, strict=True)
        ]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def run_on(hosts: list[list[str]], commands: list[list[str]]) -> None:
    environments = environment()
    running = [
        subprocess.Popen(
            [*host, *command], env=environments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for host, command in zip(hosts, commands, strict=True)
    ]
    outputs = [process.communicate(timeout=500)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], "\n".join(output[-4000:] for output in outputs)


@pytest.mark.distributed
def test_two_hosts_meet_by_torchrun(hosts, saved_olmoe, tmp_path):
    recipe = run_recipe(tmp_path, saved_olmoe, use_cpu=True, save_strategy="steps", save_steps=4)
    meeting = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"{ADDRESSES[0]}:29400", "--rdzv_id", "test"]
    run_on(
        hosts,
        [
            [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", *meeting]
            # a name server would tell the first host that it is the one they meet at
            + ["--local_addr", address, "--rdzv_conf", f"is_host={int(address == ADDRESSES[0])}"]
            + ["-m", "kappatune_plugin", "sft", "--config", str(recipe)]
            for address in ADDRESSES
        ],
    )
    assert_trained(tmp_path, saved_olmoe)


@pytest.mark.distributed
@needs_deepspeed
@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_two_hosts_of_a_deepspeed_hostfile(name, hosts, saved_olmoe, tmp_path):
    recipe = run_recipe(tmp_path, saved_olmoe, save_strategy="steps", save_steps=4)
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    meeting = ["--hostfile", str(hostfile), "--no_ssh", "--master_addr", ADDRESSES[0], "--master_port", "29500"]
    script = ["--module", "kappatune_plugin", "sft", "--config", str(recipe)]
    script += ["--deepspeed", str(RECIPES / "deepspeed" / f"{name}.json")]
    run_on(hosts, [["deepspeed", *meeting, "--node_rank", str(number), *script] for number in (0, 1)])
    assert_trained(tmp_path, saved_olmoe)
