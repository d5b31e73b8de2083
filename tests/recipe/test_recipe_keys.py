"""The page of all recipe keys, and a ranking criterion that is added in one function."""

import os
import subprocess
import sys
from pathlib import Path

from kappatune_plugin.recipe.keys_table import keys_page

PAGE = Path(__file__).parents[2] / "docs" / "recipe-keys.md"
ADDED = '''
from kappatune_plugin.selection.criteria import criterion

@criterion
def frobenius(row):
    """The Frobenius norm of the matrix. Only here to be found."""
    return row.frobenius

from kappatune_plugin.cli import main
from kappatune_plugin.recipe.blocks import KappaTuneBlock
from kappatune_plugin.recipe.keys_table import keys_page

words = "frobenius (The Frobenius norm of the matrix)"
assert words in keys_page()
assert KappaTuneBlock(rank_by="frobenius").rank_by == "frobenius"
main()
'''


def test_the_committed_page_is_what_the_models_say():
    assert PAGE.read_text(encoding="utf-8") == keys_page(), (
        "write it anew: python -m kappatune_plugin.recipe.keys_table docs/recipe-keys.md"
    )


def test_every_key_says_what_it_means():
    rows = [line for line in keys_page().splitlines() if line.startswith("| `")]
    assert len(rows) > 50 and not [row for row in rows if row.endswith("|  |")]


def test_a_criterion_is_one_function(tmp_path):
    """In a process of its own: a criterion shows up in the command line's help, in recipes and in the docs' table."""
    script = tmp_path / "added.py"
    script.write_text(ADDED)
    done = subprocess.run(
        [sys.executable, str(script), "scan", "--help"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr
    assert "frobenius" in done.stdout
