"""What `kappatune doctor` finds."""

import importlib.metadata

import pytest

from helpers.command import kappatune
from kappatune_plugin import compat
from kappatune_plugin.cli import doctor
from kappatune_plugin.compat import newer_tokenizer


def test_the_needed_packages_fit_and_are_shown_on_one_screen():
    needed, _ = doctor.findings()
    assert [finding.name for finding in needed] == ["torch", "transformers", "trl", "peft", "datasets", "accelerate"]
    assert all(finding.fits and finding.found == importlib.metadata.version(finding.name) for finding in needed)
    code, out, _ = kappatune("doctor")
    assert code == 0 and len(out.splitlines()) <= 24
    for finding in needed:
        assert finding.found in out


@pytest.mark.parametrize(
    ("found", "fits"), [(None, False), ("0.16.2", False), ("0.17.0", True), ("0.19.0.dev3", True), ("1.0", True)]
)
def test_what_is_missing_or_too_old_gets_a_cure(monkeypatch, found, fits):
    monkeypatch.setattr(doctor, "installed", lambda name: found if name == "axolotl" else None)
    axolotl = next(finding for finding in doctor.findings()[1] if finding.name == "axolotl")
    assert axolotl.fits is fits
    code, out, _ = kappatune("doctor")
    assert code == 0 and ("pip install axolotl" in out) is not fits and "kappatune-plugin[deepspeed]" in out


@pytest.mark.parametrize(("installed", "told"), [("4.57.6", True), ("5.24.0", False)])
def test_a_tokenizer_of_transformers_5_is_explained_in_4(monkeypatch, installed, told):
    monkeypatch.setattr(compat, "version", lambda name: installed)
    error = ValueError("Tokenizer class TokenizersBackend does not exist or is not currently imported.")
    assert bool(newer_tokenizer(error)) is told and newer_tokenizer(ValueError("other")) is None
