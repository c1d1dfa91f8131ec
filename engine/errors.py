"""The project's own exceptions, so that a caller can tell a user's mistake from a broken machine.

Every message names the user's value, the place it came from and the next step. The command line turns them into exit
statuses: 1 the job failed, 2 wrong usage.
"""


class FluoroscopeError(Exception):
    """Base of all errors that fluoroscope raises on purpose."""

    exit_status = 1


class UsageError(FluoroscopeError):
    """The request itself is wrong: an unknown name, key, path or option."""

    exit_status = 2


class DataError(FluoroscopeError):
    """A data set, table or annotation file cannot be used as it is."""


class ImageError(DataError):
    """One image cannot be read or decoded; extraction lists it and goes on."""


class ModelError(FluoroscopeError):
    """A model folder or name cannot be loaded as asked."""


class CacheError(FluoroscopeError):
    """The cache on disk cannot be read or written as asked."""


class TrainingError(FluoroscopeError):
    """A training cannot go on: its loss or its gradient is no number any more."""
