"""Workers that take turns on the same cores, and what their times say."""

import statistics
import time
from collections.abc import Mapping
from typing import NamedTuple

from benchmarks.machine import busy_seconds
from benchmarks.worker import Answer, Worker


class Turns(NamedTuple):
    """The answers of each round, by worker."""

    answers: list[dict[str, Answer]]
    others: float
    """Cores that were busy with something else meanwhile, on average."""

    def summary(self, name: str) -> dict[str, float]:
        """Milliseconds per step of one worker."""
        seconds = [x for answer in self.answers for x in answer[name].seconds]
        cpu_seconds = [x for answer in self.answers for x in answer[name].cpu_seconds]
        return {
            "min_ms": round(1e3 * min(seconds), 3),
            "median_ms": round(1e3 * statistics.median(seconds), 3),
            "cpu_median_ms": round(1e3 * statistics.median(cpu_seconds), 3),
        }

    def ratio(self, name: str, base: str) -> dict[str, float | list[float]]:
        """Times of one worker over those of another: the median over the rounds, the least and the largest."""

        def median(answer: Answer) -> float:
            return statistics.median(answer.seconds)

        ratios = [median(answer[name]) / median(answer[base]) for answer in self.answers]
        return {
            "ratio": round(statistics.median(ratios), 3),
            "ratios": [round(min(ratios), 3), round(max(ratios), 3)],
        }


def take_turns(workers: Mapping[str, Worker], rounds: int, steps: int, part: str = "") -> Turns:
    """A turn of warm-up for each worker, then `rounds` turns of `steps` steps of a part of its work."""
    for worker in workers.values():
        worker.steps(steps, part)
    begin, busy = time.perf_counter(), busy_seconds()
    answers = [{name: worker.steps(steps, part) for name, worker in workers.items()} for _ in range(rounds)]
    own = sum(sum(answer.cpu_seconds) for each in answers for answer in each.values())
    return Turns(answers, round((busy_seconds() - busy - own) / (time.perf_counter() - begin), 2))
