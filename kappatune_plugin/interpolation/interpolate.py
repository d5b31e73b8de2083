"""Scale back what was trained in a model until it keeps a limit of forgetting, in Python."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.forgetting.measures import measuring
from kappatune_plugin.interpolation.change import Changes
from kappatune_plugin.interpolation.dial import Dialed, DialSettings, turn
from kappatune_plugin.interpolation.find_changes import changes_of_adapter, changes_of_checkpoint
from kappatune_plugin.interpolation.texts import Texts
from kappatune_plugin.interpolation.token_losses import Piece, control_documents, row_documents, texts


def interpolate(
    base: nn.Module | None,
    trained: nn.Module,
    tokenizer: Any,
    rows: Sequence[tuple[str, str]],
    control: Mapping[str, Sequence[str]],
    max_delta: float,
    per_matrix: bool = True,
    max_length: int = 256,
    batch_size: int = 8,
) -> Dialed:
    """Scale `trained` back, in place, until the loss of each control rises by at most `max_delta`.

    Args:
        base: what it was trained from; None for a PEFT model, which holds its base.
        trained: a PEFT model with one active adapter, or a whole model of the base's architecture.
        rows: (prompt, completion) of the task that training didn't see; an empty prompt for plain text.
        control: name -> texts whose loss is not to rise. One half chooses the scales, the other verifies them.
        max_delta: in nats a token, above 0: what the rise on all texts like these is at most, with 95% confidence.
        per_matrix: a scale for each matrix, where that is better than one for all.
        max_length: of the pieces that the texts are cut into, in tokens.
        batch_size: pieces measured at once.

    Returns:
        The scales, and how sure the limit is. Save the model as usual.

    Raises:
        KappaTuneError: no scale above 0 keeps the limit, too few rows or texts, a method whose change can't be scaled,
            another base, values that aren't finite. `trained` is as it was then.
    """
    if base is None and not hasattr(trained, "peft_config"):
        raise KappaTuneError("interpolate: a whole model needs the base that it was trained from: give base.")
    changes = changes_of_adapter(trained) if hasattr(trained, "peft_config") else changes_of_checkpoint(base, trained)
    documents = {name: control_documents(tokenizer, content, max_length, False) for name, content in control.items()}
    settings = DialSettings(max_delta, per_matrix)
    return turn_model(trained, changes, row_documents(tokenizer, rows), documents, settings, batch_size)


def turn_model(
    model: nn.Module,
    changes: Changes,
    rows: Sequence[Sequence[Piece]] | Texts,
    controls: Mapping[str, Sequence[Sequence[Piece]]],
    settings: DialSettings,
    batch_size: int = 8,
    say: Callable[[str], None] = lambda text: None,
) -> Dialed:
    """`dial.turn` on a model and tokenized texts; what it raises."""
    with measuring(model):
        task = rows if isinstance(rows, Texts) else texts(model, rows, batch_size)
        return turn(
            changes, task, {name: texts(model, each, batch_size) for name, each in controls.items()}, settings, say
        )
