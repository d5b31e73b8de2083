"""W0 + alpha * (W - W0), of one trained tensor and of all of them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from kappatune_plugin.errors import KappaTuneError


@dataclass
class Change:
    """One trained tensor on the line from its base's values to its trained ones.

    Attributes:
        parameter: holds the values; read and written in place.
        base: values at alpha = 0, in the shape of `parameter[index]`; None for zeros.
        index: which part of `parameter` it is; empty for all of it.
        trained: values at alpha = 1, taken from `parameter` when this is made.
    """

    parameter: Tensor
    base: Tensor | None = None
    index: tuple[int | slice, ...] = ()

    def __post_init__(self) -> None:
        self.trained = self.part.detach().clone()

    @property
    def part(self) -> Tensor:
        """The values now, a view."""
        return self.parameter[self.index] if self.index else self.parameter

    @property
    def delta(self) -> Tensor:
        """trained - base, float32."""
        trained = self.trained.float()
        return trained if self.base is None else trained - self.base.to(trained)

    def at(self, alpha: float) -> Tensor:
        """The values at `alpha`, in the trained ones' dtype; at 0 and 1 without any rounding."""
        if alpha == 1:
            return self.trained
        base = torch.zeros_like(self.trained) if self.base is None else self.base.to(self.trained)
        return base if alpha == 0 else (base.float() + alpha * self.delta).to(self.trained.dtype)

    @torch.no_grad()
    def set(self, alpha: float) -> None:
        """Write the values at `alpha` into the parameter."""
        self.part.copy_(self.at(alpha))

    def slope(self) -> float:
        """d loss / d alpha = <d loss / d W, W - W0>, from the gradient that the last backward left; 0 without one."""
        if self.parameter.grad is None:
            return 0.0
        gradient = self.parameter.grad[self.index] if self.index else self.parameter.grad
        return float((gradient.float() * self.delta).sum())


class Changes:
    """All that was trained in a model, each part with an alpha of its own.

    Args:
        parts: name of a weight matrix (or vector) -> what changed in it; several tensors may share an alpha.
        written: called when values were changed, as tuners need it that hold copies of them.
        others: parameters that need no gradient for the alphas.

    Raises:
        KappaTuneError: there are none, or values that aren't finite.
    """

    def __init__(
        self,
        parts: Mapping[str, Sequence[Change]],
        written: Callable[[], None] = lambda: None,
        others: Sequence[Tensor] = (),
    ) -> None:
        self._parts, self._written, self._others = dict(parts), written, others
        self.names = list(parts)
        if not self.names:
            raise KappaTuneError("There is nothing to scale back: all weights are those of the base.")
        broken = [name for name, part in parts.items() if not all(bool(each.delta.isfinite().all()) for each in part)]
        if broken:
            raise KappaTuneError(
                f"{len(broken)} of {len(parts)} trained weights hold NaN or infinity, such as {broken[0]}: no scale "
                "makes them right. Give an earlier checkpoint, or train again with a lower learning_rate."
            )

    def set(self, alphas: float | Sequence[float]) -> None:
        """Give all the same alpha, or each its own, in the order of `names`."""
        each = [alphas] * len(self.names) if isinstance(alphas, int | float) else alphas
        for part, alpha in zip(self._parts.values(), each, strict=True):
            for change in part:
                change.set(float(alpha))
        self._written()

    def slopes(self) -> list[float]:
        """d loss / d alpha of each, from the gradients that the last backward left."""
        return [sum(change.slope() for change in part) for part in self._parts.values()]

    def clear(self) -> None:
        """Forget the gradients."""
        for parameter in self._parameters():
            parameter.grad = None

    @contextmanager
    def taking_gradients(self) -> Iterator[None]:
        """Only what is scaled takes gradients; afterwards all parameters do as before, and these hold none."""
        own = self._parameters()
        before = [(each, each.requires_grad) for each in [*self._others, *own]]
        try:
            for each in self._others:
                each.requires_grad_(False)
            for each in own:
                each.requires_grad_(True)
            yield
        finally:
            self.clear()
            for each, took in before:
                each.requires_grad_(took)

    def _parameters(self) -> list[Tensor]:
        return list({id(each.parameter): each.parameter for part in self._parts.values() for each in part}.values())
