"""What several rooms check by hand, and how they say it."""

import difflib
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

PROBLEMS_SHOWN = 5
# NUL, and halves of characters (surrogates): no path and no file in UTF-8 holds them
NO_CHARACTER = re.compile("[\\0\\ud800-\\udfff]")


def is_number(value: Any) -> bool:
    """A finite int or float; True and False are none, nor is an int that no float holds."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def shortened(problems: Sequence[str]) -> str:
    """The first problems, a line each, and how many more there are."""
    more = len(problems) - PROBLEMS_SHOWN
    return "\n".join([*problems[:PROBLEMS_SHOWN], *([f"... and {more} more."] if more > 0 else [])])


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ " Did you mean 'learning_rate'?", or nothing when no known word is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{near[0]}'?" if near else ""
