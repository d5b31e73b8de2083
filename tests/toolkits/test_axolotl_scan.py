"""Axolotl's own command line with our command on it; the way Axolotl finds it is tests/toolkits/run.sh axolotl's."""

from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import yaml

from kappatune_plugin import KappaReport, select

click_testing = pytest.importorskip("click.testing")
GROUP = "axolotl.cli_commands"
BLOCK = {"k": 5, "include": ["mlp"], "order": "highest"}


@pytest.fixture(scope="module")
def command():
    declared = pytest.importorskip("tomllib").loads((Path(__file__).parents[2] / "pyproject.toml").read_text())[
        "project"
    ]["entry-points"]
    ((name, value),) = declared[GROUP].items()
    return EntryPoint(name, value, GROUP).load()


def run(command, folder: Path, **content):
    path = folder / "x.yaml"
    plugins = ["kappatune_plugin.toolkits.axolotl.KappaTunePlugin"]
    path.write_text(yaml.safe_dump({"plugins": plugins, "adapter": "kappatune", "kappatune": BLOCK, **content}))
    return click_testing.CliRunner().invoke(command, [str(path), "--output", str(folder / "report.json")])


def test_it_chooses_what_training_would(command, saved_olmoe, tmp_path):
    done = run(command, tmp_path, base_model=str(saved_olmoe))
    assert done.exit_code == 0, done.output
    report = KappaReport.load(tmp_path / "report.json")
    assert all(".mlp." in unit.name for unit in report.units)
    measured = {unit.name: unit.kappa for unit in report.units}
    highest = sorted(measured, key=measured.get)[-5:]
    assert {unit.name for unit in select(report, k=5, order="highest").units} == set(highest)
    assert f"report: {tmp_path / 'report.json'}" in done.output.replace("\n", "")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"base_model": None}, "has no base_model"),
        ({"kappatune": {"k": 5, "odrer": "lowest"}}, "unknown key 'kappatune.odrer'. Did you mean 'order'?"),
        ({"kappatune": {"selection": "selection.json"}}, "nothing is left to scan"),
        ({"adapter": "lora"}, "write `adapter: kappatune`"),
        ({"lora_r": 8}, "lora_r: another method's"),
    ],
)
def test_what_does_not_fit_is_said_before_any_work(command, saved_olmoe, tmp_path, content, said):
    done = run(command, tmp_path, **{"base_model": str(saved_olmoe), **content})
    assert done.exit_code == 1 and said in done.output
    assert not (tmp_path / "report.json").exists()
