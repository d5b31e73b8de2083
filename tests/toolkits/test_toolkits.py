"""The toolkits' own commands on tiny models: `pytest -m toolkit`. Each first makes an environment, in minutes."""

import subprocess
from pathlib import Path

import pytest


@pytest.mark.toolkit
@pytest.mark.parametrize("name", ["axolotl", "llamafactory", "llamafactory-4", "trl-old", "trl-mid", "trl-latest"])
def test_trains_exactly_the_selected(name):
    subprocess.run([Path(__file__).with_name("run.sh"), name], check=True)
