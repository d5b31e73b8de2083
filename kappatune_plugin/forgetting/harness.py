"""Tasks of EleutherAI's lm-evaluation-harness (package lm_eval), run on the model in memory."""

import difflib
import functools
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy
from torch import nn
from transformers import PreTrainedTokenizerBase

from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.forgetting.measures import measuring


def check_harness(tasks: Sequence[str], include_path: str | None = None) -> None:
    """Whether the harness is installed and knows the tasks; arguments as `run_harness`.

    Raises:
        KappaTuneError: it isn't, or doesn't; says what to install, or which names are near.
    """
    known = _task_manager(include_path).all_tasks
    for task in tasks:
        if task not in known:
            near = difflib.get_close_matches(task, known, n=3, cutoff=0.6)
            hint = f" Did you mean {', '.join(near)}?" if near else ""
            raise KappaTuneError(
                f"forgetting.lm_eval: the lm-evaluation-harness has no task '{task}' among its {len(known)}.{hint} "
                "`lm-eval ls tasks` lists them; a folder of your own tasks goes into include_path."
            )


def run_harness(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    limit: int | None = None,
    num_fewshot: int | None = None,
    include_path: str | None = None,
    batch_size: int = 8,
) -> dict[str, float]:
    """Measure `tasks`; leaves the model's mode and all random states as they were.

    Args:
        tasks: names of tasks or groups.
        limit: examples of each task; None for all.
        num_fewshot: examples shown before the question; None as each task says.
        include_path: a folder with tasks of one's own, as YAML files.

    Returns:
        "lm_eval/TASK/METRIC" -> value, without standard errors.

    Raises:
        KappaTuneError: the harness isn't installed, or its data can't be had.
    """
    manager = _task_manager(include_path)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    with measuring(model), _random_states():
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        try:
            results = simple_evaluate(
                wrapped,
                tasks=list(tasks),
                num_fewshot=num_fewshot,
                limit=limit,
                task_manager=manager,
                bootstrap_iters=0,
                log_samples=False,
            )
        except (OSError, ValueError) as error:
            # data sets that the hub doesn't give: ConnectionError, DatasetNotFoundError, FileNotFoundError, ValueError
            raise KappaTuneError(f"forgetting.lm_eval: {type(error).__name__}: {error}") from error
    return {
        f"lm_eval/{task}/{metric.partition(',')[0]}": float(value)
        for task, metrics in results["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, int | float) and "," in metric and "_stderr" not in metric
    }


@functools.cache
def _task_manager(include_path: str | None) -> Any:
    """The harness' tasks; finding them reads thousands of files, seconds each time."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise KappaTuneError(
            f"forgetting.lm_eval needs the lm-evaluation-harness, which can't be imported ({error}): "
            "pip install 'kappatune-plugin[lm_eval]', or delete lm_eval from the recipe."
        ) from error
    return TaskManager(include_path=include_path)


@contextmanager
def _random_states() -> Iterator[None]:
    """Python's and numpy's random states afterwards as before: the harness seeds them."""
    states = random.getstate(), numpy.random.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
