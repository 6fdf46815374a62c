"""Construction of the phases and the schedule of a run; the curriculum is imported only for runs that have one."""

from recallax.train.phases import FullTraining, Phase, PhaseSchedule, SinglePhase
from recallax.train.run_config import RunConfig


def make_phases(config: RunConfig) -> list[Phase]:
    """Return the phases of a run, in order.

    Args:
        config: Config of the run.

    Returns:
        One phase per stage of the curriculum, or a single phase without one.

    Raises:
        ConfigError: A stage does not fit the model.
    """
    if config.curriculum is None:
        return [FullTraining(config)]
    from recallax.train.curriculum.stage_phase import resolve_stages

    return [*resolve_stages(config)]


def make_schedule(config: RunConfig) -> PhaseSchedule:
    """Return the schedule of a run, at its first phase."""
    if config.curriculum is None:
        return SinglePhase()
    from recallax.train.curriculum.schedule import CurriculumSchedule

    return CurriculumSchedule(config.curriculum)
