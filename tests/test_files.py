"""Files are whole or not there, and replace only what this package wrote."""

import json
import os
import stat

import pytest

from kappatune_plugin import KappaTuneError
from kappatune_plugin.files import alone, check_output, check_replaceable, opening, read_json, write_json, write_text


def test_a_file_of_the_same_kind_is_replaced_and_no_other(tmp_path):
    path = tmp_path / "report.json"
    write_json(path, {"units": [], "base": 1})
    write_json(path, {"units": [1]})
    assert read_json(path, "a report") == {"format": 1, "units": [1]}
    with pytest.raises(KappaTuneError, match="is no such file"):
        write_json(path, {"k": 3, "units": []})
    path.write_text("# my notes")
    with pytest.raises(KappaTuneError, match="is no such file"):
        check_output(path, opening("units"))
    assert path.read_text() == "# my notes"
    path.write_text("")
    write_json(path, {"units": [2]})
    assert json.loads(path.read_text())["units"] == [2]


def test_links_folders_and_pipes_stay_what_they_are(tmp_path):
    (tmp_path / "target").write_text("precious")
    (tmp_path / "link").symlink_to("target")
    os.mkfifo(tmp_path / "pipe")
    for name, what in (("link", "link"), ("pipe", "device or pipe"), (".", "folder")):
        with pytest.raises(KappaTuneError, match=f"it is a {what}"):
            write_text(tmp_path / name, "text", begins="")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "precious"


@pytest.mark.parametrize("name", ["a\0b", "m" * 300, "file/x"])
def test_names_that_no_file_can_have(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(KappaTuneError, match="Can't write"):
        check_output(tmp_path / name, "")
    with pytest.raises(KappaTuneError, match="Can't write"):
        write_text(tmp_path / name, "text")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_new_file_is_as_the_umask_says_and_an_old_one_as_it_was(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "new", "text")
        (tmp_path / "old").write_text("")
        (tmp_path / "old").chmod(0o600)
        write_text(tmp_path / "old", "text")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {"new": 0o640, "old": 0o600}


def test_deep_json_is_no_traceback(tmp_path):
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(KappaTuneError, match="isn't JSON"):
        read_json(tmp_path / "deep.json", "a kappa report")


def test_two_at_once_are_refused_and_a_killed_one_is_not(tmp_path):
    pid = os.fork()
    if pid == 0:
        with alone(tmp_path, "run"):
            os._exit(0)
    os.waitpid(pid, 0)
    with alone(tmp_path, "run"), pytest.raises(KappaTuneError, match="Another run is at work"), alone(tmp_path, "run"):
        pass
    check_replaceable(tmp_path / "nothing", "")
    assert list(tmp_path.iterdir()) == []
