"""Templates such as "Tweet: {text}\\nSarcasm:", filled from the columns of a row and from nothing else."""

import re
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator

from kappatune_plugin.checks import did_you_mean
from kappatune_plugin.errors import KappaTuneError

RULE = (
    "A template holds plain {column} names, {column:.512} for the first 512 characters; a literal brace is written {{ "
    "or }}."
)
FIRST = re.compile(r"\.([1-9]\d{0,8})")


@dataclass(frozen=True)
class Template:
    """A parsed template.

    Attributes:
        parts: (literal text, column name that follows it or None, how many of its first characters or None for all).
    """

    parts: tuple[tuple[str, str | None, int | None], ...]

    @property
    def columns(self) -> list[str]:
        """The columns that it names, in order."""
        return [column for _, column, _ in self.parts if column is not None]

    def fill(self, row: Mapping[str, Any]) -> str:
        """The text for `row`. Braces in the values stay as they are."""
        words = ((text, "" if column is None else str(row[column])[:first]) for text, column, first in self.parts)
        return "".join(text + value for text, value in words)


def parse_template(template: str, what: str) -> Template:
    """Read a template; unlike `str.format`, it reaches no attribute, item or conversion.

    Args:
        what: the template's key in the recipe, for errors ("prompt").

    Raises:
        KappaTuneError: not a string, braces that don't pair up, or anything but a column's name in braces.
    """
    try:
        return _parse(template)
    except KappaTuneError as error:
        raise KappaTuneError(f"{what}: {error}") from error


def _parse(template: Any) -> Template:
    if not isinstance(template, str):
        raise KappaTuneError(f'{template!r} is not a text. Write it in quotes: "Tweet: {{text}}\\nSarcasm:".')
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise KappaTuneError(f"{template!r}: {error}. {RULE}") from error
    for _, column, spec, conversion in parsed:
        if column is None:
            continue
        cut = not spec or FIRST.fullmatch(spec)
        if conversion or not cut or not column or column.isdigit() or set(column) & set(".[]"):
            written = column + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            raise KappaTuneError(f"{{{written}}} in {template!r} is not a column's name. {RULE}")
    return Template(tuple((text, column, int(spec[1:]) if spec else None) for text, column, spec, _ in parsed))


def check_template(template: Any) -> Any:
    """The template as it is. Raises KappaTuneError, without a key's name in front, if it is none."""
    _parse(template)
    return template


# a checked template in a block, kept as the text it is
TemplateText = Annotated[Any, AfterValidator(check_template)]


def check_columns(template: Template, what: str, columns: Iterable[str]) -> None:
    """Raises KappaTuneError if `template` names a column that isn't among `columns`; lists them, the nearest first."""
    columns = list(columns)
    for column in template.columns:
        if column not in columns:
            raise KappaTuneError(
                f"{what}: the rows have no column '{column}'.{did_you_mean(column, columns)} "
                f"Columns: {', '.join(columns)}."
            )
