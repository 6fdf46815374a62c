"""From a config to a trained, evaluated and reported run."""
