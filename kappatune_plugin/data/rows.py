"""Load data sets as a recipe names them: a hub id or a file in, rows out."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from datasets import Dataset
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, model_validator

from kappatune_plugin.checks import did_you_mean
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.schema import Block, Whole, read

BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {"sample_by": "paragraph"}),
}
KEYS = ("path", "name", "split", "take", "data_files", "data_dir", "revision", "columns", "features", "token")
REFUSED = {
    "trust_remote_code": "data sets never run code here; use one in Parquet or JSON",
    "streaming": "give a part of the data by split, such as 'train[:1000]', or its first rows by take: 1000",
}
# keys of data.test that replace those of the block
TEMPLATES = ("prompt", "completion")
EXAMPLE = "{path: cardiffnlp/tweet_eval, name: irony, split: 'train[:200]'}, or {path: rows.jsonl}"


class DataSet(Block):
    """A data set, as a recipe names it; a text alone is its path. Other keys go to `datasets.load_dataset`."""

    model_config = ConfigDict(extra="allow")

    path: str = Field(
        min_length=1,
        description="A hub id, a folder, or a file in .jsonl, .json, .csv, .tsv, .parquet or .txt.",
        examples=[EXAMPLE],
    )
    name: Any = Field(default=None, description="Which configuration of a hub's data set.")
    split: str | None = Field(
        default=None, description="Which rows, such as 'train[:200]'; train if not given.", examples=["split: train"]
    )
    take: Whole | None = Field(
        default=None, ge=1, description="Only the first rows, so many; no more of a hub's data set is downloaded."
    )

    @model_validator(mode="before")
    @classmethod
    def _mapping(cls, spec: Any) -> Any:
        if isinstance(spec, str):
            return {"path": spec}
        if not isinstance(spec, Mapping) or not all(isinstance(key, str) for key in spec):
            raise KappaTuneError(f"{spec!r:.80} is not a data set. Write {EXAMPLE}.")
        refused = [f"{key} is not taken: {why}." for key, why in REFUSED.items() if spec.get(key)]
        if refused:
            raise KappaTuneError("\n".join(refused))
        return dict(spec)


def one_or_more(specs: Any) -> Any:
    """A data set or a list of them, checked, as mappings."""
    if not isinstance(specs, list):
        return DataSet.given(specs)
    return [each.model_dump(exclude_unset=True) for each in TypeAdapter(list[DataSet]).validate_python(specs)]


DataSets = Annotated[Any, AfterValidator(one_or_more)]


def load_rows(spec: Mapping[str, Any] | str, what: str, base: Path | None = None) -> Dataset:
    """Load the rows that a block of a recipe names.

    Args:
        spec: path (a hub id, a file that ends in .jsonl, .json, .csv, .tsv, .parquet or .txt, or a folder), name,
            split (default "train"), take (the number of first rows to load; no more of a hub's data set is downloaded),
            and other arguments of `datasets.load_dataset`; a string is a path. A .txt file gives a row of "text" for
            each paragraph, separated by blank lines.
        what: what errors call the rows ("training data").
        base: the recipe's folder, searched for a relative path that doesn't exist from the current folder.

    Raises:
        KappaTuneError: no such file, hub id out of reach, unknown split or key, unreadable or empty data.
    """
    problems = read(DataSet, spec, f"{what}: ")[1]
    if problems:
        raise KappaTuneError("\n".join(problems))
    spec = local_spec(spec, base)
    path, split, take = spec.pop("path"), spec.pop("split", None) or "train", spec.pop("take", None)
    if os.path.isdir(path) and os.path.realpath(path) == os.path.abspath(os.sep):
        raise KappaTuneError(f"{what}: '{path}' is the root folder, all of this machine. Give a folder of data files.")
    if os.path.isfile(path):
        builder, options = _builder(path, what)
        rows = _load(builder, {**options, **spec, "data_files": path}, split, what, shown=path)
        rows = rows if take is None else rows.select(range(min(take, len(rows))))
    elif _looks_local(path):
        raise KappaTuneError(f"{what}: there is no file or folder '{path}'{_looked_in(base)}. Check data's `path`.")
    else:
        rows = _load(path, spec, split, what, shown=path, take=take)
    if len(rows) == 0:
        raise KappaTuneError(f"{what}: '{path}', split '{split}', has no rows. Give data that has some.")
    return rows


def load_all_rows(specs: Sequence[Any] | Mapping[str, Any] | str, what: str, base: Path | None = None) -> Dataset:
    """Load one data set, or a list of them concatenated, with the columns that all of them have.

    Raises:
        KappaTuneError: as `load_rows`; also data sets without a column in common, or with columns of one name and
            different types.
    """
    if not isinstance(specs, list):
        return load_rows(specs, what, base)
    from datasets import ClassLabel, Value, concatenate_datasets

    parts = [load_rows(spec, f"{what}[{position}]", base) for position, spec in enumerate(specs)]
    common = [column for column in parts[0].column_names if all(column in part.column_names for part in parts)]
    if not common:
        columns = "; ".join(", ".join(part.column_names) for part in parts)
        raise KappaTuneError(f"{what}: the {len(parts)} data sets have no column in common: {columns}.")
    plain = []
    for part in parts:
        part = part.select_columns(common)
        # data sets with different names for the same labels couldn't be concatenated
        for column in [name for name, feature in part.features.items() if isinstance(feature, ClassLabel)]:
            part = part.cast_column(column, Value("int64"))
        plain.append(part)
    try:
        return concatenate_datasets(plain)
    except ValueError as error:
        raise KappaTuneError(f"{what}: the data sets don't go together: {error}") from error


def local_spec(spec: Mapping[str, Any] | str, base: Path | None) -> dict[str, Any]:
    """`spec` as a mapping, with paths that only exist below the folder `base` replaced by those."""
    spec = dict(spec) if isinstance(spec, Mapping) else {"path": spec}
    for key in {"path", "data_files", "data_dir"} & set(spec):
        spec[key] = _each_local(spec[key], base)
    return spec


def _load(path: str, options: dict[str, Any], split: str, what: str, shown: str, take: int | None = None) -> Dataset:
    from datasets import Dataset, load_dataset

    options = {key: value for key, value in options.items() if value is not None}
    try:
        rows = load_dataset(path, split=split, streaming=take is not None, **options)
        if take is not None:
            rows = Dataset.from_list(list(rows.take(take)), features=rows.features)
    except Exception as error:
        # datasets raises anything here: ConnectionError, ValueError, TypeError, StopIteration, its own errors
        raise KappaTuneError(_load_problem(error, options, split, what, shown)) from error
    if not isinstance(rows, Dataset):
        raise KappaTuneError(f"{what}: '{shown}' gave {type(rows).__name__}, one split is expected. Give `split`.")
    return rows


def _load_problem(error: Exception, options: dict[str, Any], split: str, what: str, shown: str) -> str:
    """What went wrong in `load_dataset`, in our words where they say more."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, ConnectionError):
        return (
            f"{what}: the hub's data set '{shown}' is out of reach ({error}). Check its name and the network "
            "(HF_HUB_OFFLINE must not be set), or give the path of a file."
        )
    empty = "corresponds to no data" in str(error) or "at least one example" in str(error.__cause__)
    if empty or isinstance(error, StopIteration):
        return f"{what}: '{shown}', split '{split}', has no rows. Give data that has some."
    if "Unknown split" in str(error) or "Unrecognized instruction" in str(error):
        return f"{what}: '{shown}': {error} Write split: train, test or a part such as 'train[:200]'."
    if isinstance(error, TypeError | ValueError):
        for key in options:
            if key not in KEYS and f"'{key}'" in str(error):
                return f"{what}: unknown key '{key}'.{did_you_mean(key, KEYS)} ({text})"
    if isinstance(error.__cause__ or error, UnicodeDecodeError):
        return f"{what}: '{shown}' isn't UTF-8 text ({error.__cause__ or error}). Save it as UTF-8."
    cause = f" ({error.__cause__})" if error.__cause__ else ""
    return f"{what}: can't load '{shown}': {text}{cause}"


def _builder(path: str, what: str) -> tuple[str, dict[str, Any]]:
    ending = Path(path).suffix.lower()
    if ending not in BUILDERS:
        raise KappaTuneError(f"{what}: '{path}' ends in '{ending}'; expected one of {', '.join(BUILDERS)}.")
    return BUILDERS[ending]


def find_local(path: str, base: Path | None) -> str:
    """`path` itself if it exists, else the one in the recipe's folder if that exists, else `path`."""
    path = os.path.expanduser(path)
    if base is not None and not os.path.exists(path) and os.path.exists(base / path):
        return str(base / path)
    return path


def _each_local(files: Any, base: Path | None) -> Any:
    """`find_local` for each path in `files`: a path, or a list or mapping of them, as for `data_files`."""
    if isinstance(files, str):
        return find_local(files, base)
    if isinstance(files, Mapping):
        return {key: _each_local(value, base) for key, value in files.items()}
    return [_each_local(value, base) for value in files] if isinstance(files, list) else files


def _looks_local(path: str) -> bool:
    """Whether `path` can only mean a file: a hub id is NAME or OWNER/NAME."""
    if os.path.exists(path):
        return False
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or Path(path).suffix.lower() in BUILDERS


def _looked_in(base: Path | None) -> str:
    return " (looked in the current folder" + (f" and in {base})" if base else ")")
