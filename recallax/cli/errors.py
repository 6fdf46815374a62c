"""The errors that a user's input or machine can cause; the command line shows them without a traceback."""

from recallax.config import ConfigError
from recallax.convert.key_map import WeightsError
from recallax.models.prompts import PromptError
from recallax.report import ReportError
from recallax.train.checkpoint import CheckpointError
from recallax.train.log import LogError
from recallax.train.run_folder import RunFolderError

USER_ERRORS = (
    ConfigError,
    CheckpointError,
    LogError,
    PromptError,
    ReportError,
    RunFolderError,
    WeightsError,
    FileNotFoundError,
)
