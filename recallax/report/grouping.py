"""Runs put together: seeds of one setting, and settings of one model."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from recallax.report.runs import RunSummary

SEED_FIELDS = ("train.seed", "train.data_seed")


@dataclass(frozen=True)
class Setting:
    """Finished runs whose configs are equal but for their seeds."""

    label: str
    runs: tuple[RunSummary, ...]

    @property
    def config(self) -> dict[str, str]:
        """What they share."""
        return {path: value for path, value in self.runs[0].config.items() if path not in SEED_FIELDS}

    def model_key(self) -> tuple[tuple[str, str], ...]:
        """The task's and the model's part of the config: settings that differ elsewhere are of one model."""
        return tuple(sorted(leaf for leaf in self.config.items() if leaf[0].split(".")[0] in ("task", "model")))

    def seeds(self) -> set[tuple[str | None, ...]]:
        return {_seed_key(run) for run in self.runs}

    def test_accuracies(self) -> list[float]:
        """Test accuracy of each run."""
        return [value for run in self.runs if (value := run.test_accuracy()) is not None]

    def mean_valid_accuracy(self, seeds: Iterable[tuple[str | None, ...]] | None = None) -> float:
        """The mean over runs (with these seeds) of the last accuracy on valid; below any accuracy if there is none."""
        wanted = self.seeds() if seeds is None else set(seeds)
        found = [run.valid_accuracy[-1][1] for run in self.runs if run.valid_accuracy and _seed_key(run) in wanted]
        return fmean(found) if found else -1.0

    def state_bytes(self) -> float | None:
        return self.runs[0].info_number("state_bytes")


def group_by_setting(runs: Sequence[RunSummary]) -> list[Setting]:
    """In the order of their first runs; runs that are not finished, or have no finite accuracy, are left out."""
    found: dict[frozenset[tuple[str, str]], list[RunSummary]] = {}
    for run in runs:
        if run.test_accuracy() is not None:
            found.setdefault(frozenset(leaf for leaf in run.config.items() if leaf[0] not in SEED_FIELDS), []).append(
                run
            )
    settings = [Setting(common_label([run.label for run in group]), tuple(group)) for group in found.values()]
    return _with_unique_setting_labels(settings)


@dataclass(frozen=True)
class ModelGroup:
    """Settings that differ in no more than optimizer, training and evaluation."""

    label: str
    settings: tuple[Setting, ...]

    def best_setting(self) -> Setting:
        """The setting that is best on valid."""
        return best_setting(self.settings)


def group_by_model(settings: Sequence[Setting]) -> list[ModelGroup]:
    """In the order of their first settings, called what the names of their runs have in common."""
    found: dict[tuple[tuple[str, str], ...], list[Setting]] = {}
    for setting in settings:
        found.setdefault(setting.model_key(), []).append(setting)
    labels = [common_label([setting.label for setting in group]) for group in found.values()]
    models = [ModelGroup(label, tuple(group)) for label, group in zip(labels, found.values(), strict=True)]
    return _number_duplicates(models, labels, lambda model, label: replace(model, label=label))


def best_setting(settings: Sequence[Setting]) -> Setting:
    """The one that is best on valid; of equals the one with most seeds.

    By the seeds that all of them have, where there are such: of many settings with one seed each some are lucky, and
    would win against the mean of several.
    """
    shared = set.intersection(*(setting.seeds() for setting in settings)) or None
    return max(settings, key=lambda setting: (setting.mean_valid_accuracy(shared), len(setting.seeds())))


def common_label(labels: Sequence[str]) -> str:
    """The words of the first label that all of them have; the whole first label if they share none."""
    shared = set.intersection(*(set(label.split()) for label in labels))
    return " ".join(word for word in labels[0].split() if word in shared) or labels[0]


def _seed_key(run: RunSummary) -> tuple[str | None, ...]:
    return tuple(run.config.get(path) for path in SEED_FIELDS)


def _with_unique_setting_labels(settings: list[Setting]) -> list[Setting]:
    """With different labels: those that share one get what differs between them behind it, or else a number."""

    def with_differences(setting: Setting) -> str:
        same = [other for other in settings if other.label == setting.label]
        if len(same) == 1:
            return setting.label
        paths = [p for p in setting.config if len({other.config.get(p) for other in same}) > 1]
        told = [f"{path.rsplit('.', 1)[-1]}={setting.config[path].strip(chr(34))}" for path in paths]
        return " ".join([setting.label, *told])

    return _number_duplicates(
        settings, [with_differences(setting) for setting in settings], lambda s, label: replace(s, label=label)
    )


def _number_duplicates[T](items: list[T], labels: list[str], name: Callable[[T, str], T]) -> list[T]:
    unique = [f"{label} #{i}" if labels.count(label) > 1 else label for i, label in enumerate(labels, 1)]
    return [name(item, label) for item, label in zip(items, unique, strict=True)]
