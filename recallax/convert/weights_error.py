"""The error for weights that cannot be imported or exported."""

from recallax.external_file import printable


class WeightsError(ValueError):
    """Raised for weight files that are missing or malformed, and for weights that do not fit the model.

    Args:
        message: The message. Control characters, which names from files may contain, are escaped.
    """

    def __init__(self, message: str):
        super().__init__(printable(message))
