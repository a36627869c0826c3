"""Mistakes that the command line shows as one line."""


class ConfigError(ValueError):
    """A config that cannot be run; the message says what to do."""


class RunError(RuntimeError):
    """A run directory that cannot be used; the message says what to do."""
