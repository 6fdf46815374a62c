"""The error for weights that cannot be imported or exported."""


class WeightsError(ValueError):
    """Raised for weight files that are missing or malformed, and for weights that do not fit the model."""
