"""A folder that a model is written to: complete under its name, or not there; nobody else's files are replaced."""

import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.files import alone, as_umask_says, exchange

# what `save_pretrained` of models, tokenizers and processors leaves
CHECKPOINT_FILES = re.compile(
    r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
    r"|(generation_|(video_)?preprocessor_|processor_)?config\.json"
    r"|(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template)\.json|(merges|vocab)\.txt"
    r"|(tokenizer|spiece|sentencepiece\.bpe)\.model|.*\.jinja|(modeling|configuration|tokenization)_\w+\.py"
)
UNFINISHED = ".unfinished-"
CARD, CARD_MARK = "README.md", "<!-- kappatune_plugin wrote this card, and writes it anew -->"
# pictures that a card shows
CARD_PICTURES = ("forgetting.png", "interpolation.png")


def check_free(output_dir: Path, sources: Sequence[Path], overwrite: bool) -> None:
    """Refuse, before the work, to write a model to a folder that holds anything else than an older one.

    Args:
        sources: what is read, which may not be overwritten.
        overwrite: whether a checkpoint that is there may be replaced.

    Raises:
        KappaTuneError: `output_dir` is no folder, one of the sources, around one, or not empty.
    """
    if os.path.lexists(output_dir) and not output_dir.is_dir():
        raise KappaTuneError(f"output_dir '{output_dir}' is no folder. Give another name.")
    for source in sources:
        if output_dir.resolve() == source.resolve():
            raise KappaTuneError(f"output_dir '{output_dir}' is what is read. Give another folder.")
        # a hub name is no folder, though it reads like one
        if source.exists() and output_dir.resolve() in source.resolve().parents:
            raise KappaTuneError(f"output_dir '{output_dir}' holds '{source}', which is read. Give another folder.")
    found = [path.name for path in _files(output_dir)]
    if found and not overwrite:
        raise KappaTuneError(f"output_dir '{output_dir}' is not empty. Give another folder, or add --overwrite.")
    card = output_dir / CARD
    ours = {CARD, *CARD_PICTURES} if card.is_file() and CARD_MARK in card.read_text(encoding="utf-8") else set()
    others = [name for name in found if not CHECKPOINT_FILES.fullmatch(name) and name not in ours]
    # a merge that was killed while it put its files there has left the others beside them
    killed = output_dir.is_dir() and any(UNFINISHED in path.name for path in output_dir.iterdir())
    if others or (found and "config.json" not in found and not killed):
        what = f"files of no checkpoint, such as {others[0]}" if others else "no whole checkpoint"
        raise KappaTuneError(f"output_dir '{output_dir}' holds {what}: --overwrite leaves it alone. Give another one.")


def _files(folder: Path) -> list[Path]:
    """What is in a folder, without what a merge that was killed left in it."""
    return sorted(path for path in folder.iterdir() if UNFINISHED not in path.name) if folder.is_dir() else []


@contextmanager
def staging(output_dir: Path) -> Iterator[Path]:
    """A folder to write to, on the disk of `output_dir`, for `publish`; those that killed commands left are deleted.

    Raises:
        KappaTuneError: nothing can be written there.
    """
    name = f".{output_dir.name}{UNFINISHED}"
    parent = output_dir.parent if _replaceable_whole(output_dir) else output_dir
    folder = parent / f"{name}{secrets.token_hex(4)}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for left in [*output_dir.parent.glob(f"{name}*"), *output_dir.glob(f"{name}*")]:
            # one that another merge is writing stays
            with suppress(KappaTuneError), alone(left, "merge"):
                shutil.rmtree(left)
        (folder / "model").mkdir(parents=True)
        with alone(folder, "merge"):
            yield folder / "model"
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise KappaTuneError(f"Can't write '{output_dir}': {reason}. Choose another folder.") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _replaceable_whole(output_dir: Path) -> bool:
    """Whether another folder can take its place: it is no mount point, and this process doesn't stand in it."""
    parent = output_dir.parent
    if not output_dir.is_dir():
        return True
    stands_in_it = output_dir in (here := Path.cwd(), *here.parents)
    return not stands_in_it and output_dir.stat().st_dev == parent.stat().st_dev and os.access(parent, os.W_OK)


def publish(folder: Path, output_dir: Path) -> None:
    """Put what was written to `folder` in the place of `output_dir`, in one step where the system has one for it.

    Elsewhere (no Linux, a mount point, the current folder) a kill leaves nothing that loads wrong.
    """
    as_umask_says(folder)
    if not output_dir.is_dir():
        os.replace(folder, output_dir)
        return
    folder.chmod(output_dir.stat().st_mode)
    if exchange(folder, output_dir):
        return
    # without its config.json a folder doesn't load, whatever else is in it: neither the old model nor a mixture
    for old in sorted(_files(output_dir), key=lambda path: path.name != "config.json"):
        old.unlink()
    for path in sorted(folder.iterdir(), key=lambda path: path.name == "config.json"):
        os.replace(path, output_dir / path.name)
