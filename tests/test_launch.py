"""`kappatune sft` through the launchers: several processes, and two hosts that are two network namespaces."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import accelerate.commands.launch
import pytest
from peft import PeftModel
from ranks import ENVIRONMENT, free_port
from transformers import AutoModelForCausalLM

from kappatune_plugin import KappaTuneError
from kappatune_plugin.launch import launch, split_words
from kappatune_plugin.recipe import load_recipe
from recipes import tiny_recipe, write_recipe

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed isn't installed")
NO_GPU = Path(__file__).parent / "no_gpu"
RECIPES = Path(__file__).parent.parent / "recipes"
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
        [f"--accelerate_config={path}"], {"accelerate_config": "zero3", "num_processes": 2, "k": 1}
    )
    assert found == ["--config_file", str(path), "--num_processes", "2"] and rest == []


def test_an_unknown_configuration_names_those_there_are():
    with pytest.raises(KappaTuneError, match="'zero4' is neither .*fsdp2.*zero2, zero3"):
        split_words(["--accelerate_config", "zero4"], {})
    with pytest.raises(KappaTuneError, match="'' is neither"):
        split_words(["--accelerate_config"], {})


def test_a_recipe_may_hold_launch_keys(saved_olmoe, tmp_path):
    recipe = tiny_recipe(tmp_path, saved_olmoe, accelerate_config="zero3", num_processes=2)
    assert load_recipe(write_recipe(tmp_path / "recipe.yaml", recipe)).kappatune.k == 7


def test_accelerate_gets_the_command(monkeypatch):
    seen = []
    monkeypatch.setattr(accelerate.commands.launch, "launch_command", seen.append)
    launch(["--num_processes", "2"], ["sft", "--config", "r.yaml", "--seed", "1"])
    assert seen[0].num_processes == 2 and seen[0].module and seen[0].training_script == "kappatune_plugin"
    assert seen[0].training_script_args == ["sft", "--config", "r.yaml", "--seed", "1"]


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


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["fsdp2", *[pytest.param(f"zero{n}", marks=needs_deepspeed) for n in (2, 3)]])
def test_accelerate_config(name, saved_olmoe, tmp_path):
    recipe = run_recipe(tmp_path, saved_olmoe, save_strategy="steps", save_steps=4)
    words = ["--accelerate_config", name, "--num_processes", "2", "--mixed_precision", "no"]
    words += ["--main_process_port", str(free_port())]
    command = [sys.executable, "-m", "kappatune_plugin", "sft", "--config", str(recipe), *words]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert_trained(tmp_path, saved_olmoe)


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
