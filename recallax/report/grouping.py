"""Grouping of runs: seeds of one setting, and settings of one model."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from recallax.report.runs import RunSummary

SEED_FIELDS = ("train.seed", "train.data_seed")
"""Paths of the config fields in which the runs of a setting may differ."""

type SeedKey = tuple[str | None, ...]
"""The seeds of a run."""


@dataclass(frozen=True)
class Setting:
    """Finished runs whose configs differ in their seeds only."""

    label: str
    """Name of the setting in tables and figures."""
    runs: tuple[RunSummary, ...]

    @property
    def config(self) -> dict[str, str]:
        """The leaves of the config that the runs share, by path."""
        return {path: value for path, value in self.runs[0].config.items() if path not in SEED_FIELDS}

    def model_key(self) -> tuple[tuple[str, str], ...]:
        """Return the task and model parts of the config. Settings with equal keys have the same model."""
        return tuple(sorted(leaf for leaf in self.config.items() if leaf[0].split(".")[0] in ("task", "model")))

    def seeds(self) -> set[SeedKey]:
        """Return the seeds of the runs."""
        return {_seed_key(run) for run in self.runs}

    def test_accuracies(self) -> list[float]:
        """Return the test accuracy of each run."""
        return [value for run in self.runs if (value := run.test_accuracy()) is not None]

    def mean_valid_accuracy(self, seeds: Iterable[SeedKey] | None = None) -> float:
        """Return the mean of the runs' last accuracies on the valid split; -1 if there is none.

        Args:
            seeds: Seeds of the runs to average; all runs where None.
        """
        selected = self.seeds() if seeds is None else set(seeds)
        values = [run.valid_accuracy[-1][1] for run in self.runs if run.valid_accuracy and _seed_key(run) in selected]
        return fmean(values) if values else -1.0

    def state_bytes(self) -> float | None:
        """Return the state size in bytes per sequence, if the log has it."""
        return self.runs[0].info_number("state_bytes")


def group_by_setting(runs: Sequence[RunSummary]) -> list[Setting]:
    """Group runs whose configs differ in their seeds only.

    Args:
        runs: The runs. Those without a finite test accuracy are omitted.

    Returns:
        Settings with unique labels, in the order of their first runs.
    """
    groups: dict[frozenset[tuple[str, str]], list[RunSummary]] = {}
    for run in runs:
        if run.test_accuracy() is not None:
            key = frozenset(leaf for leaf in run.config.items() if leaf[0] not in SEED_FIELDS)
            groups.setdefault(key, []).append(run)
    settings = [Setting(common_label([run.label for run in group]), tuple(group)) for group in groups.values()]
    return _with_unique_setting_labels(settings)


@dataclass(frozen=True)
class ModelGroup:
    """Settings with the same task and model, which differ in optimizer, training or evaluation only."""

    label: str
    """Name of the model in tables and figures."""
    settings: tuple[Setting, ...]

    def best_setting(self) -> Setting:
        """Return the setting with the highest accuracy on the valid split."""
        return best_setting(self.settings)


def group_by_model(settings: Sequence[Setting]) -> list[ModelGroup]:
    """Group settings with the same task and model.

    Args:
        settings: The settings.

    Returns:
        Models in the order of their first settings. Their labels are the words that the labels of their settings share.
    """
    groups: dict[tuple[tuple[str, str], ...], list[Setting]] = {}
    for setting in settings:
        groups.setdefault(setting.model_key(), []).append(setting)
    labels = [common_label([setting.label for setting in group]) for group in groups.values()]
    models = [ModelGroup(label, tuple(group)) for label, group in zip(labels, groups.values(), strict=True)]
    return _number_duplicates(models, labels, lambda model, label: replace(model, label=label))


def best_setting(settings: Sequence[Setting]) -> Setting:
    """Select the setting with the highest accuracy on the valid split, and among equals the one with the most seeds.

    The accuracies are compared on the seeds that all settings share, if there are any. Otherwise the luckiest of many
    settings with one seed would win against the mean of several seeds.

    Args:
        settings: At least one setting.
    """
    shared = set.intersection(*(setting.seeds() for setting in settings)) or None
    return max(settings, key=lambda setting: (setting.mean_valid_accuracy(shared), len(setting.seeds())))


def common_label(labels: Sequence[str]) -> str:
    """Return the words of the first label that all labels share; the whole first label if they share none.

    Args:
        labels: At least one label.
    """
    shared = set.intersection(*(set(label.split()) for label in labels))
    return " ".join(word for word in labels[0].split() if word in shared) or labels[0]


def _seed_key(run: RunSummary) -> SeedKey:
    return tuple(run.config.get(path) for path in SEED_FIELDS)


def _with_unique_setting_labels(settings: list[Setting]) -> list[Setting]:
    """Make labels unique: equal ones get the fields in which their settings differ, or else a number."""

    def with_differences(setting: Setting) -> str:
        same = [other for other in settings if other.label == setting.label]
        if len(same) == 1:
            return setting.label
        paths = [p for p in setting.config if len({other.config.get(p) for other in same}) > 1]
        values = [f"{path.rsplit('.', 1)[-1]}={setting.config[path].strip(chr(34))}" for path in paths]
        return " ".join([setting.label, *values])

    return _number_duplicates(
        settings, [with_differences(setting) for setting in settings], lambda s, label: replace(s, label=label)
    )


def _number_duplicates[T](items: list[T], labels: list[str], name: Callable[[T, str], T]) -> list[T]:
    """Name the items by their labels; labels that occur more than once get a number."""
    unique = [f"{label} #{i}" if labels.count(label) > 1 else label for i, label in enumerate(labels, 1)]
    return [name(item, label) for item, label in zip(items, unique, strict=True)]
