# pyright: strict
"""Detection of spikes of the training loss."""

from collections import deque
from collections.abc import Iterable
from statistics import median
from typing import NamedTuple

SPIKE_FACTOR = 10.0
"""Multiple of the running median from which a loss is a spike."""
MIN_SPIKE_LOSS = 0.1
"""Nats below which no loss is a spike: a single wrong answer of a model that has learned its task is not one."""
WINDOW_STEPS, MIN_STEPS = 100, 10
"""Number of finite steps of the running median, and the number from which on it is used."""


class LossSpike(NamedTuple):
    """The first step of a spike."""

    loss: float
    """Loss of the step in nats."""
    median: float
    """Running median before the step in nats."""


class LossSpikes:
    """Compares the loss of every finite step with the running median of the losses before it.

    Args:
        losses: Losses of the last steps, oldest first, as `to_json` returned them.
    """

    def __init__(self, losses: Iterable[str | float] = ()) -> None:
        self._losses = deque(map(float, losses), maxlen=WINDOW_STEPS)

    def add(self, loss: float) -> LossSpike | None:
        """Add the loss of a step.

        Args:
            loss: The loss in nats.

        Returns:
            The spike, if one starts at this step. Further steps of a spike are not reported.
        """
        spike, in_spike = self._find_spike(loss, list(self._losses)), False
        if spike is not None:
            *before, previous = self._losses
            in_spike = self._find_spike(previous, before) is not None
        self._losses.append(loss)
        return None if in_spike else spike

    def to_json(self) -> list[str]:
        """Return the losses as text, which is exact."""
        return [repr(loss) for loss in self._losses]

    @staticmethod
    def _find_spike(loss: float, before: list[float]) -> LossSpike | None:
        if loss < MIN_SPIKE_LOSS or len(before) < MIN_STEPS:
            return None
        middle = median(before)
        return LossSpike(loss, middle) if loss > SPIKE_FACTOR * middle else None
