"""Refinement of a grid of learning rates around the best one."""

import math
from collections.abc import Mapping

from recallax.train.log import finite_number


def refine_learning_rates(
    accuracy_by_rate: Mapping[float, float | str | None], expand_factor: float = 2.0, min_ratio: float = math.sqrt(2)
) -> tuple[float, ...]:
    """Select the learning rates to try next.

    While the best rate is at the edge of the grid, the next rate is `expand_factor` beyond it. Then the geometric means
    of the best rate and its neighbours follow, until the neighbours are within `min_ratio` of it.

    Args:
        accuracy_by_rate: Accuracy of each rate tried so far, as a row has it. An accuracy that is not a finite number,
            such as "nan", is below all others.
        expand_factor: Factor between the edge of the grid and the next rate.
        min_ratio: Ratio of neighbouring rates at which the refinement ends.

    Returns:
        The rates in ascending order; none if the best rate is settled, or no accuracy is finite.

    Raises:
        ValueError: No rate has been tried.
    """
    if not accuracy_by_rate:
        raise ValueError("accuracy_by_rate is empty; begin with a grid of learning rates")
    rates = sorted(accuracy_by_rate)
    finite = {rate: value for rate, x in accuracy_by_rate.items() if (value := finite_number(x)) is not None}
    if not finite:
        return ()
    best = max(sorted(finite), key=finite.__getitem__)
    index = rates.index(best)
    next_rates = []
    for neighbour, beyond_edge in ((index - 1, best / expand_factor), (index + 1, best * expand_factor)):
        if not 0 <= neighbour < len(rates):
            next_rates.append(beyond_edge)
        # The rates are rounded to six digits, hence the tolerance.
        elif max(rates[neighbour] / best, best / rates[neighbour]) > min_ratio * (1 + 1e-9):
            next_rates.append(math.sqrt(rates[neighbour] * best))
    return tuple(sorted(float(f"{rate:.6g}") for rate in next_rates))
