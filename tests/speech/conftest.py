"""Granite's feature extractor runs in these tests with and without torchaudio."""

import pytest

from helpers.speech import play_torchaudio


@pytest.fixture(autouse=True)
def _torchaudio(monkeypatch):
    play_torchaudio(monkeypatch)
