"""The scales that learn most within a limit of forgetting: chosen on some texts, verified on others."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.files import write_json
from kappatune_plugin.interpolation import per_matrix
from kappatune_plugin.interpolation.change import Changes
from kappatune_plugin.interpolation.one_scale import largest_within
from kappatune_plugin.interpolation.texts import ENOUGH, Control, Rise, Texts

PER_MATRIX, ONE, TRAINED = "per_matrix", "one", "trained"
FRONTIER = (0.25, 0.5, 0.75)
# of the scales that one scale a matrix ended with: how much further they may go, all together
FURTHER = 1.5
FEWEST_ROWS, FEWEST_DOCUMENTS = 4, 2
# tokens to choose and to verify by, and of a mini-batch
LEAST = 1024, 2048, 64
# a gradient of whole matrices takes so many tokens' time beside its own, however small the mini-batch: measured with
# SmolLM2-135M on a CPU, where the weights go through memory several times
GRADIENT = 192


@dataclass(frozen=True)
class DialSettings:
    """How the scales are chosen.

    Attributes:
        limit: most that the loss of any control may rise, in nats a token.
        per_matrix: try one scale for each matrix, beside one for all.
        choose_tokens, verify_tokens: about how many tokens of each control (and of the task's rows) are measured to
            choose, and of each control to verify.
        steps, batch: of choosing one scale a matrix: steps of about so many tokens of the task and of each control.
        within: about how many tokens all of it may read, a backward pass counting as two more; the other numbers are
            lowered to keep it. None for no limit.
        seed: divides the texts and deals the mini-batches.
        quiet: no progress bar.
    """

    limit: float
    per_matrix: bool = True
    choose_tokens: int = 4096
    verify_tokens: int = 16384
    steps: int = 24
    batch: int = 512
    within: int | None = None
    seed: int = 0
    quiet: bool = False

    def affordable(self, controls: int) -> "DialSettings":
        """These settings with fewer tokens, where `within` asks for it; never less than `LEAST` of them."""
        fixed = self._gradients(controls) * GRADIENT
        share = 1.0 if self.within is None else (self.within - fixed) / (self.reads(controls) - fixed)
        share = min(1.0, share)
        names = ("choose_tokens", "verify_tokens", "batch")
        kept = {name: max(least, round(share * getattr(self, name))) for name, least in zip(names, LEAST, strict=True)}
        return replace(self, **kept)

    def reads(self, controls: int) -> int:
        """About how many tokens so many controls take: passes to choose and to verify, more for a scale a matrix."""
        choose, verify = (14, 6) if self.per_matrix else (8, 4)
        passes = controls * (choose * self.choose_tokens + verify * self.verify_tokens) + 4 * self.choose_tokens
        return passes + self._gradients(controls) * (3 * self.batch + GRADIENT)

    def _gradients(self, controls: int) -> int:
        return self.steps * (1 + controls) if self.per_matrix else 0


@dataclass
class Dialed:
    """What was chosen, and how sure it is.

    Attributes:
        limit: of the rise of each control's loss, in nats a token.
        mode: "trained" where nothing had to be taken back, else "one" or "per_matrix".
        alphas: name of each trained matrix or vector -> its scale, 0 the base's values and 1 the trained ones.
        one: the largest scale for all that kept the limit while choosing.
        verified: control -> its rise on the documents that took no part in choosing.
        task: mean loss on held-out rows, in nats a token: "base", "trained", "kept", and "one" at one scale for all.
        frontier: [{"alpha", "task_loss", "control_rise"}] along one scale for all, on the texts to choose by.
        seconds: how long all of it took.
    """

    limit: float
    mode: str = TRAINED
    alphas: dict[str, float] = field(default_factory=dict)
    one: float = 1.0
    verified: dict[str, Rise] = field(default_factory=dict)
    task: dict[str, float] = field(default_factory=dict)
    frontier: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The content of interpolation.json; what isn't finite is null."""
        controls = {name: {**asdict(rise), "enough": rise.enough} for name, rise in self.verified.items()}
        content = {**asdict(self), "verified": controls}
        return _finite(content)

    def save(self, path: Path) -> None:
        """Write interpolation.json, atomically."""
        write_json(path, self.to_dict())

    def sentences(self) -> list[str]:
        """What was kept, what it keeps to and how sure that is, for a person."""
        scales = np.array(list(self.alphas.values()))
        if self.mode == TRAINED:
            kept = "Everything that was trained was kept."
        elif self.mode == ONE:
            kept = f"{scales[0]:.3f} of every trained change was kept."
        else:
            low, middle, high = np.quantile(scales, [0, 0.5, 1])
            kept = (
                f"Each of {len(scales)} trained weights has its own scale: {low:.2f} to {high:.2f}, the median "
                f"{middle:.2f}; one scale for all would be {self.one:.3f}."
            )
        said = [kept]
        for name, rise in self.verified.items():
            said.append(
                f"{name}: the loss rose by {rise.mean:+.4f} nats a token on {rise.documents} documents that took no "
                f"part in choosing; with 95% confidence by at most {rise.upper:.4f} on all like them (limit "
                f"{self.limit:g})."
            )
            if not rise.enough:
                said.append(
                    f"{name}: {rise.documents} documents are too few to promise anything of others: give "
                    f"{2 * ENOUGH} or more (half of them choose)."
                )
        return said


def turn(
    changes: Changes,
    task: Texts,
    controls: Mapping[str, Texts],
    settings: DialSettings,
    say: Callable[[str], None] = lambda text: None,
) -> Dialed:
    """Scale `changes` so that the task's loss is lowest while each control's loss rises by at most `settings.limit`.

    One half of each control's documents chooses; the other half verifies, by the upper limit of its mean rise, and
    where that is above the limit all scales go down until it isn't. One scale for each matrix is kept only if its
    loss on rows that it wasn't fitted to is below that of one scale for all. The model holds the result.

    Raises:
        KappaTuneError: no control, too few rows or documents, or no scale above 0 that keeps the limit: then the model
            holds what was trained.
    """
    _check(task, controls)
    started = time.monotonic()
    try:
        found = _Dial(changes, task, controls, settings, say).turn()
    except BaseException:
        changes.set(1.0)
        raise
    found.seconds = round(time.monotonic() - started, 1)
    return found


class _Dial:
    def __init__(
        self,
        changes: Changes,
        task: Texts,
        controls: Mapping[str, Texts],
        settings: DialSettings,
        say: Callable[[str], None],
    ) -> None:
        self.changes, self.settings = changes, settings.affordable(len(controls))
        settings = self.settings
        rows = task.up_to(settings.choose_tokens)
        self.fitted, self.compared = rows.take(range(0, len(rows), 2)), rows.take(range(1, len(rows), 2))
        started = time.monotonic()
        changes.set(0.0)
        self.choosing, self.verifying = {}, {}
        for name, texts in controls.items():
            order = np.random.default_rng(settings.seed).permutation(len(texts)).tolist()
            middle = len(texts) // 2
            self.choosing[name] = Control(texts.take(order[:middle]).up_to(settings.choose_tokens))
            self.verifying[name] = Control(texts.take(order[middle:]).up_to(settings.verify_tokens))
        say(self._how_long(time.monotonic() - started))
        self.result = Dialed(settings.limit, task={"base": self._task_loss()})

    def turn(self) -> Dialed:
        self._along_one()
        count = len(self.changes.names)
        plans = [(ONE if self.result.one < 1 else TRAINED, [self.result.one] * count)]
        if self.settings.per_matrix and self.result.mode != TRAINED:
            plans = self._each_its_own() + plans
        for place, (mode, alphas) in enumerate(plans):
            scale = largest_within(lambda scale, alphas=alphas: self._upper(self.verifying, alphas, scale), self.limit)
            better = (
                scale > 0
                and any(alphas)
                and (place == len(plans) - 1 or self._still_better(alphas, scale, plans[-1][1]))
            )
            if better:
                return self._settle(mode if scale == 1 else (ONE if mode == TRAINED else mode), _scaled(alphas, scale))
        raise KappaTuneError(
            f"No scale above 0 keeps the control loss within {self.limit:g} nats a token (upper limit with 95% "
            f"confidence): nothing was scaled. Give more control documents, or a larger max_delta."
        )

    @property
    def limit(self) -> float:
        return self.settings.limit

    def _along_one(self) -> None:
        """The largest scale for all, and the losses along it."""
        result, count = self.result, len(self.changes.names)
        ones, points = [1.0] * count, {0.0: 0.0}

        def upper(scale: float) -> float:
            found = self._upper(self.choosing, ones, scale)
            points[scale] = self._mean
            return found

        result.one = largest_within(upper, self.limit)
        for alpha in FRONTIER:
            if alpha not in points:
                upper(alpha)
        for alpha in sorted({0.0, *FRONTIER, result.one, 1.0}):
            loss = result.task["base"] if alpha == 0 else self._task_loss(alpha)
            result.frontier.append({"alpha": alpha, "task_loss": loss, "control_rise": points[alpha]})
        result.task["trained"] = result.frontier[-1]["task_loss"]
        result.mode = TRAINED if result.one == 1 else ONE

    def _each_its_own(self) -> list[tuple[str, list[float]]]:
        """One scale for each matrix, if it is better than one for all; nothing otherwise."""
        settings, start = self.settings, self.result.one or 1 / 64
        self._upper(self.choosing, [start] * len(self.changes.names), 1.0)
        # the mean may go as near to the limit as its uncertainty lets it
        target = max(self.limit - (self._worst - self._mean), self.limit / 4)
        controls = list(self.choosing.values())
        options = {"steps": settings.steps, "batch": settings.batch, "seed": settings.seed, "quiet": settings.quiet}
        with self.changes.taking_gradients():
            alphas = per_matrix.choose(self.changes, self.fitted, controls, start, target, **options)
        scale = largest_within(lambda scale: self._upper(self.choosing, alphas, scale), self.limit, most=FURTHER)
        alphas = _scaled(alphas, scale)
        better = max(alphas) > 0 and self._task_loss(alphas) < self._task_loss(self.result.one)
        return [(PER_MATRIX, alphas)] if better else []

    def _still_better(self, alphas: list[float], scale: float, one: list[float]) -> bool:
        """Whether what verifying left of one scale a matrix is better than what it leaves of one for all."""
        if scale == 1:
            return True
        other = largest_within(lambda scale: self._upper(self.verifying, one, scale), self.limit)
        return self._task_loss(_scaled(alphas, scale)) < self._task_loss(_scaled(one, other))

    def _settle(self, mode: str, alphas: list[float]) -> Dialed:
        result = self.result
        result.mode, result.alphas = mode, dict(zip(self.changes.names, alphas, strict=True))
        result.task |= {"one": self._task_loss(result.one), "kept": self._task_loss(alphas)}
        result.verified = {name: control.rise() for name, control in self.verifying.items()}
        return result

    def _upper(self, controls: Mapping[str, Control], alphas: Sequence[float], scale: float) -> float:
        """The largest upper limit of a control's rise at `scale` times `alphas`; `_mean` is that control's estimate."""
        self.changes.set(_scaled(alphas, scale))
        worst = max((control.rise() for control in controls.values()), key=lambda rise: rise.upper)
        self._worst, self._mean = worst.upper, worst.mean
        return worst.upper

    def _task_loss(self, alphas: float | Sequence[float] | None = None) -> float:
        """On the rows to compare by, which no scale is fitted to."""
        if alphas is not None:
            self.changes.set(alphas)
        return float(self.compared.measured().sum() / sum(self.compared.tokens))

    def _how_long(self, seconds: float) -> str:
        """From the time that measuring the base took."""
        halves = (*self.choosing.values(), *self.verifying.values())
        about = seconds * self.settings.reads(len(self.choosing)) / sum(sum(half.texts.lengths) for half in halves)
        return f"Scaling back what was trained until it keeps its limit: about {max(1, round(about))} seconds."


def _scaled(alphas: Sequence[float], scale: float) -> list[float]:
    return [min(1.0, alpha * scale) for alpha in alphas]


def _check(task: Texts, controls: Mapping[str, Texts]) -> None:
    if not controls:
        raise KappaTuneError("There is no control to keep a limit on: add forgetting.control, such as `control: self`.")
    if len(task) < FEWEST_ROWS:
        raise KappaTuneError(
            f"{len(task)} rows are held out from training, {FEWEST_ROWS} are the least to choose scales by: give "
            "data.validation, or write `interpolate: off` in the block forgetting."
        )
    for name, texts in controls.items():
        if len(texts) < FEWEST_DOCUMENTS:
            raise KappaTuneError(
                f"forgetting.control {name} has {len(texts)} documents: half choose the scales and half verify them. "
                f"Give {FEWEST_DOCUMENTS} at least, {2 * ENOUGH} for a promise."
            )


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not np.isfinite(content) else content
