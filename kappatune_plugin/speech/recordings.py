"""Files and `datasets.Audio` columns in, mono samples at the rate that a model expects out."""

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Audio, Dataset

from kappatune_plugin.checks import did_you_mean
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.speech.settings import AudioBlock

RECORDING, TRANSCRIPT = "recording", "transcript"
INSTALL = "Recordings are read by soundfile and soxr: pip install 'kappatune-plugin[speech]'."


def speech_rows(rows: Dataset, audio: AudioBlock, what: str, base: Path | None = None) -> Dataset:
    """Rows with the columns `recording` (as `read` takes it) and `transcript`, each of them checked.

    Args:
        what: what errors call the rows ("data.train").
        base: the recipe's folder, where names of files start without `audio.folder`.

    Raises:
        KappaTuneError: a column that isn't there, a missing, unreadable, empty or too long recording, or a transcript
            without words; the first of each, with its row.
    """
    for key, column in (("column", audio.column), ("transcript", audio.transcript)):
        if column not in rows.column_names:
            raise KappaTuneError(
                f"audio.{key}: {what} has no column '{column}', only {', '.join(rows.column_names)}."
                f"{did_you_mean(column, rows.column_names)}"
            )
    if isinstance(rows.features[audio.column], Audio):
        # decoded here: datasets' own decoder needs ffmpeg
        rows = rows.cast_column(audio.column, Audio(decode=False))
    rows = rows.select_columns([audio.column, audio.transcript])
    rows = rows.rename_columns({audio.column: RECORDING, audio.transcript: TRANSCRIPT})
    folder = _folder(audio, base)
    if isinstance(rows[0][RECORDING], str):
        rows = rows.map(lambda row: {RECORDING: _placed(row[RECORDING], folder)})
    for number, row in enumerate(rows):
        _check(row, f"{what}, row {number}", audio)
    return rows


def _folder(audio: AudioBlock, base: Path | None) -> Path:
    folder = Path(audio.folder or ".").expanduser()
    for place in (folder, (base or Path()) / folder):
        if audio.folder is not None and place.is_dir():
            return place.resolve()
    if audio.folder is not None:
        raise KappaTuneError(f"audio.folder: there is no folder '{audio.folder}'. Give the one that the files are in.")
    return (base or Path()).resolve()


def _placed(name: str, folder: Path) -> str:
    # absolute names stay as they are
    return os.path.join(folder, name) if isinstance(name, str) else name


def _check(row: Mapping[str, Any], where: str, audio: AudioBlock) -> None:
    text = row[TRANSCRIPT]
    if not isinstance(text, str) or not any(letter.isalnum() for letter in text):
        raise KappaTuneError(
            f"{where}: its transcript {text!r:.60} has no words, so there is nothing to learn or to count. Leave the "
            "row out, or give what was said."
        )
    seconds = _seconds(row[RECORDING], where)
    if audio.max_seconds is not None and seconds > audio.max_seconds:
        raise KappaTuneError(
            f"{where}: its recording is {seconds:.1f} s long, and audio.max_seconds is {audio.max_seconds:g}. Leave "
            "the row out, cut the recording, or raise max_seconds."
        )


def _seconds(recording: Any, where: str) -> float:
    """How long a recording is, from its header alone."""
    if isinstance(recording, Mapping) and recording.get("array") is not None:
        frames, rate = len(recording["array"]), recording["sampling_rate"]
    else:
        with _opened(recording, where) as file:
            frames, rate = file.frames, file.samplerate
    if frames == 0:
        raise KappaTuneError(f"{where}: its recording{_name(recording)} is empty. Leave the row out or record it anew.")
    return frames / rate


def read(recording: Any, rate: int, where: str = "a recording") -> np.ndarray:
    """The samples of a recording, mono float32 in [-1, 1], resampled to `rate` per second.

    Args:
        recording: the path of a file, or a row of `datasets.Audio`: {"bytes", "path"} or {"array", "sampling_rate"}.
        where: what errors call it.

    Raises:
        KappaTuneError: a file that isn't there or can't be read, or no samples in it.
    """
    if isinstance(recording, Mapping) and recording.get("array") is not None:
        samples, found = np.asarray(recording["array"], dtype=np.float32), recording["sampling_rate"]
    else:
        with _opened(recording, where) as file:
            samples, found = file.read(dtype="float32", always_2d=True).mean(axis=1), file.samplerate
    if samples.size == 0:
        raise KappaTuneError(f"{where}: it{_name(recording)} is empty. Leave the row out or record it anew.")
    if found == rate:
        return samples
    try:
        import soxr
    except ImportError as error:
        raise KappaTuneError(INSTALL) from error
    return soxr.resample(samples, found, rate)


def _opened(recording: Any, where: str) -> Any:
    try:
        import soundfile
    except ImportError as error:
        raise KappaTuneError(INSTALL) from error
    held = recording.get("bytes") if isinstance(recording, Mapping) else None
    path = recording.get("path") if isinstance(recording, Mapping) else recording
    if held is None and not isinstance(path, str):
        raise KappaTuneError(f"{where}: {recording!r:.60} is no recording; expected a file's name or datasets.Audio.")
    if held is None and not os.path.isfile(path):
        raise KappaTuneError(
            f"{where}: there is no file '{path}'. Check the name, and audio.folder, where names start."
        )
    try:
        return soundfile.SoundFile(path if held is None else io.BytesIO(held))
    except soundfile.LibsndfileError as error:
        size = os.path.getsize(path) if held is None else len(held)
        found = "is empty" if size == 0 else f"can't be read: {error.error_string}"
        raise KappaTuneError(f"{where}: its recording{_name(recording)} {found} Give .wav or .flac.") from error


def _name(recording: Any) -> str:
    path = recording.get("path") if isinstance(recording, Mapping) else recording
    return f" '{path}'" if isinstance(path, str) else ""


def rate_of(processor: Any, expected: int | None = None) -> int:
    """The samples per second that a processor expects.

    Raises:
        KappaTuneError: it is not `expected`, or it is no processor of recordings.
    """
    parts = (getattr(processor, name, None) for name in ("feature_extractor", "audio_processor"))
    found = next((part.sampling_rate for part in parts if hasattr(part, "sampling_rate")), None)
    if found is None:
        raise KappaTuneError(
            f"The model has a {type(processor).__name__}, which takes no recordings. Give a speech model, such as "
            "Qwen/Qwen2-Audio-7B, or delete the block audio."
        )
    if expected is not None and found != expected:
        raise KappaTuneError(
            f"audio.sampling_rate: {expected} is given, and the model's processor expects {found}. Delete the key "
            f"(recordings at any rate are resampled), or write `sampling_rate: {found}`."
        )
    return found
