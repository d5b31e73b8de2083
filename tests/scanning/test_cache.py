"""The cache: nothing is measured twice, and nothing wrong comes out of it, whatever happens to its files."""

import errno
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from helpers.tiny import tiny_model
from kappatune_plugin.condition.number import condition_number
from kappatune_plugin.scanning import cache as cache_module
from kappatune_plugin.scanning import measure as measure_module
from kappatune_plugin.scanning.cache import Cache, cache_folder, content_hash
from kappatune_plugin.scanning.scan import scan
from kappatune_plugin.selection.report import UnitReport
from kappatune_plugin.weights.safetensors_files import TensorFiles
from kappatune_plugin.weights.units import WeightUnit

UNIT = WeightUnit("a.weight", (6, 4), "a.weight", groups=frozenset({"router"}))


def quiet(model: object, **settings):
    return scan(model, progress=False, **settings)


@pytest.fixture
def measured(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes of the matrices measured, as they come."""
    shapes = []

    def counting(matrix, *args):
        shapes.append(tuple(matrix.shape))
        return condition_number(matrix, *args)

    monkeypatch.setattr(measure_module, "condition_number", counting)
    return shapes


def entries(kind: str) -> list[Path]:
    return [path for path in sorted((cache_folder() / kind).rglob("*")) if path.is_file()]


def test_nothing_is_measured_twice(saved_olmoe, measured):
    first = quiet(saved_olmoe)
    assert len(measured) == len(first.units)
    assert quiet(saved_olmoe) == first and len(measured) == len(first.units)
    # in memory, under other names or with other exclusions: the same matrices
    assert quiet(tiny_model("olmoe", vocab_size=300)).units == first.units and len(measured) == len(first.units)
    more = quiet(saved_olmoe, exclude=())
    assert len(measured) == len(more.units) == len(first.units) + 2


def test_known_files_are_not_read_again(saved_olmoe, monkeypatch):
    first = quiet(saved_olmoe)

    def refuse(*args):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(TensorFiles, "read", refuse)
    assert quiet(saved_olmoe) == first
    with pytest.raises(AssertionError):
        quiet(saved_olmoe, cache=False)


def test_changed_files_are_read_again(tmp_path, measured):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    first = quiet(tmp_path)
    state = (tmp_path / "model.safetensors").stat()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    model.save_pretrained(tmp_path)
    # as a copy that keeps the time would be
    os.utime(tmp_path / "model.safetensors", ns=(state.st_atime_ns, state.st_mtime_ns))
    measured.clear()
    second = quiet(tmp_path)
    different = [a.name for a, b in zip(first.units, second.units, strict=True) if a != b]
    assert different == ["model.layers.1.mlp.up_proj.weight"] and len(measured) == 1
    assert first.base["hash"] != second.base["hash"]


def test_other_precision_is_measured_again(measured):
    model = nn.Linear(8, 6)
    loose, fine = quiet(model), quiet(model, rtol=1e-14)
    assert len(measured) == 2 and loose.units[0].method != fine.units[0].method
    assert quiet(model, rtol=1e-14) == fine and quiet(model) == loose and len(measured) == 2


def test_another_engine_measures_again(measured, monkeypatch):
    model = nn.Linear(8, 6)
    quiet(model)
    monkeypatch.setattr(cache_module, "_engine", lambda: "another")
    quiet(model)
    assert len(measured) == 2


def test_without_a_cache_nothing_is_kept(measured):
    model = nn.Linear(8, 6)
    quiet(model, cache=False)
    assert not entries("matrices") and quiet(model, cache=False) and len(measured) == 2


def test_what_is_known_above_a_bound():
    row = UnitReport(
        "a.weight", (6, 4), None, 30.0, None, "above", 2.0, None, None, None, None, 1.0, "gram32", ("router",)
    )
    cache = Cache(cache_folder())
    cache.keep_row("content", row, 1e-3)
    found = cache.row("content", UNIT, 1e-3, above=29.0)
    assert (found.status, found.lo, found.kappa, found.groups) == ("above", 30.0, None, ("router",))
    assert cache.row("content", UNIT, 1e-3, above=31.0) is None and cache.row("content", UNIT, 1e-3) is None
    settled = UnitReport.of("a.weight", (6, 4), condition_number(torch.randn(6, 4)))
    cache.keep_row("content", settled, 1e-3)
    assert cache.row("content", UNIT, 1e-3, above=1.0).kappa == cache.row("content", UNIT, 1e-3).kappa == settled.kappa


def test_content_is_dtype_shape_and_values():
    values = torch.randn(6, 4)
    same = [values, values.clone(), values.t().contiguous().t(), torch.cat([values, values])[6:]]
    other = [values.double(), values.t(), values.reshape(4, 6), -values, values.bfloat16(), values.half()]
    assert len({content_hash(each) for each in same}) == 1
    assert len({content_hash(each) for each in [values, *other]}) == 1 + len(other)


@pytest.mark.parametrize("damage", ["", "not JSON", "cut", "fields missing"])
def test_damaged_entries_are_measured_again_with_one_warning(saved_olmoe, measured, damage):
    first = quiet(saved_olmoe)
    change = {"cut": lambda text: text[:-20], "fields missing": lambda text: '{"kappa": 2.0, "base_hash": "0"}'}
    for path in [*entries("matrices"), *entries("files")]:
        path.write_text(change.get(damage, lambda _: damage)(path.read_text()))
    measured.clear()
    with pytest.warns(UserWarning, match="Damaged entries of the cache") as caught:
        assert quiet(saved_olmoe) == first
    assert len([each for each in caught if "Damaged" in str(each.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert quiet(saved_olmoe) == first


def test_full_disk_costs_a_warning(saved_olmoe, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    expected = quiet(saved_olmoe, cache=False)
    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(UserWarning, match="not written any more: .*No space left on device") as caught:
        assert quiet(saved_olmoe) == expected
    assert len(caught) == 1 and not entries("matrices")


def test_cache_that_must_not_be_read_or_written(saved_olmoe, tmp_path, monkeypatch):
    expected = quiet(saved_olmoe, cache=False)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KAPPATUNE_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning):
        assert quiet(saved_olmoe) == expected


def test_folder_is_where_caches_are(monkeypatch):
    monkeypatch.setenv("KAPPATUNE_CACHE", "/a/b")
    assert cache_folder() == Path("/a/b")
    monkeypatch.delenv("KAPPATUNE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    assert cache_folder() == Path("/c/kappatune")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "kappatune"


THREE_SCANS = """
import multiprocessing, os, signal, sys, time
from pathlib import Path
from kappatune_plugin import scan

model, output, cache = sys.argv[1], sys.argv[2], Path(os.environ["KAPPATUNE_CACHE"])

def one(name):
    scan(model, progress=False).save(f"{output}/{name}.json")

fork = multiprocessing.get_context("fork")
processes = [fork.Process(target=one, args=(name,)) for name in ("killed", "first", "second")]
for process in processes:
    process.start()
while not any(cache.glob("matrices/*/*.json")):
    time.sleep(0.001)
os.kill(processes[0].pid, signal.SIGKILL)
for process in processes:
    process.join()
print([process.exitcode for process in processes])
"""


@pytest.mark.slow
def test_two_scans_at_once_and_one_killed(tmp_path):
    """Whatever a killed process left, those that run beside it and after it find what one alone finds."""
    tiny_model("olmoe", num_experts=24).save_pretrained(tmp_path / "model")
    expected = quiet(tmp_path / "model", cache=False)
    # a fork of a process with threads may hang, so it gets one of its own
    command = [sys.executable, "-c", THREE_SCANS, str(tmp_path / "model"), str(tmp_path)]
    output = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert output.stdout.strip() == f"[-{signal.SIGKILL:d}, 0, 0]", output.stderr
    assert not (tmp_path / "killed.json").exists()
    texts = {(tmp_path / f"{name}.json").read_bytes() for name in ("first", "second")}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = quiet(tmp_path / "model")
    again.save(tmp_path / "again.json")
    assert texts == {(tmp_path / "again.json").read_bytes()} and again == expected
