"""Run workers alternately on the same cores, and summarise their times."""

import statistics
import time
from collections.abc import Mapping
from typing import NamedTuple

from benchmarks.machine import busy_cpu_seconds
from benchmarks.messages import StepReply
from benchmarks.worker import Worker


class InterleavedTimes(NamedTuple):
    """Times of several workers, measured in rounds of one burst of steps each."""

    replies: list[dict[str, StepReply]]
    """Replies of each round, by worker."""
    other_cores: float
    """Cores that other processes used meanwhile, on average."""

    def summary(self, name: str) -> dict[str, float]:
        """Summarise the times of one worker.

        Args:
            name: The worker.

        Returns:
            Milliseconds per step: least and median wall time, and median CPU time.
        """
        seconds = [x for reply in self.replies for x in reply[name].seconds]
        cpu_seconds = [x for reply in self.replies for x in reply[name].cpu_seconds]
        return {
            "min_ms": round(1e3 * min(seconds), 3),
            "median_ms": round(1e3 * statistics.median(seconds), 3),
            "cpu_median_ms": round(1e3 * statistics.median(cpu_seconds), 3),
        }

    def ratio(self, name: str, base: str) -> dict[str, float | list[float]]:
        """Divide the times of one worker by those of another, round by round.

        Args:
            name: The worker of the numerator.
            base: The worker of the denominator.

        Returns:
            The median over the rounds as `ratio`, the least and the largest as `ratios`.
        """

        def median(reply: StepReply) -> float:
            return statistics.median(reply.seconds)

        ratios = [median(reply[name]) / median(reply[base]) for reply in self.replies]
        return {
            "ratio": round(statistics.median(ratios), 3),
            "ratios": [round(min(ratios), 3), round(max(ratios), 3)],
        }


def run_interleaved(workers: Mapping[str, Worker], rounds: int, steps: int, part: str = "") -> InterleavedTimes:
    """Run workers alternately: one burst each to warm up, then `rounds` bursts each.

    Args:
        workers: By name, in the order in which they run.
        rounds: Measured bursts of each worker.
        steps: Steps in a burst.
        part: The part of the workload; "" where it has one part only.

    Returns:
        The times of the measured bursts.
    """
    for worker in workers.values():
        worker.run_steps(steps, part)
    begin, busy = time.perf_counter(), busy_cpu_seconds()
    replies = [{name: worker.run_steps(steps, part) for name, worker in workers.items()} for _ in range(rounds)]
    own = sum(sum(reply.cpu_seconds) for each in replies for reply in each.values())
    other_cores = (busy_cpu_seconds() - busy - own) / (time.perf_counter() - begin)
    return InterleavedTimes(replies, round(other_cores, 2))
