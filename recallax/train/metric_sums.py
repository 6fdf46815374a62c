# pyright: strict
"""Running sums of the metrics of training steps, which a checkpoint stores between two rows of the log."""

from collections.abc import Mapping
from typing import Any

from recallax.train.step import StepMetrics

type JsonObject = dict[str, Any]


class MetricSums:
    """Sums over the finite steps since the last row of the log, and the number of the other steps.

    The sums are Python floats (float64), and the JSON has all of their digits. The row of a run that resumes between
    two rows is therefore that of an uninterrupted run.

    Args:
        data: What `to_json` returned. None: no steps.
    """

    def __init__(self, data: Mapping[str, Any] | None = None) -> None:
        data = data or {}
        self._num_finite = int(data.get("num_finite", 0))
        self.num_skipped = int(data.get("num_skipped", 0))
        """Number of steps that were not finite."""
        self.skip_reason: str | None = data.get("skip_reason")
        """Name of the value that was not finite in the first of them."""
        self._sums = {name: float(value) for name, value in data.get("sums", {}).items()}
        """By name: sums over steps, or, with the suffix /total or /weight, those of a weighted mean."""

    def add(self, metrics: StepMetrics) -> None:
        """Add a finite step.

        Args:
            metrics: The metrics, on the host.
        """
        self._num_finite += 1
        values = {"loss": metrics.loss, "gradient_norm": metrics.gradient_norm}
        means = {"accuracy": metrics.accuracy, **{f"term/{name}": mean for name, mean in metrics.terms.items()}}
        for name, (total, weight) in means.items():
            values |= {f"{name}/total": total, f"{name}/weight": weight}
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value)

    def add_skipped(self, reason: str) -> None:
        """Add a step that was not finite.

        Args:
            reason: Name of the value that was not finite.
        """
        self.num_skipped += 1
        self.skip_reason = self.skip_reason or reason

    def means(self) -> dict[str, float]:
        """Return the means over the finite steps by name; empty if there are none."""
        if not self._num_finite:
            return {}
        names = [name.removesuffix("/total") for name in self._sums if name.endswith("/total")]
        means = {name: _divide(self._sums[f"{name}/total"], self._sums[f"{name}/weight"]) for name in names}
        steps = {name: self._sums[name] / self._num_finite for name in ("loss", "gradient_norm")}
        return {"loss": steps["loss"], "accuracy": means.pop("accuracy"), **steps, **means}

    def to_json(self) -> JsonObject:
        """Return JSON values; sums as text, which is exact and also represents NaN."""
        sums = {name: repr(value) for name, value in self._sums.items()}
        counts = {"num_finite": self._num_finite, "num_skipped": self.num_skipped}
        return {**counts, "skip_reason": self.skip_reason, "sums": sums}


def _divide(total: float, weight: float) -> float:
    return total / weight if weight else float("nan")
