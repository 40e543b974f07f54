"""Exceptions for invalid input, as distinct from bugs in this library or its dependencies."""


class DarexError(ValueError):
    """Invalid input; the message says what is wrong, where, and how to fix it.

    Every deliberate input check of this library raises a subclass. The command line shows it as one line;
    any other exception is a bug, whose traceback `darex --debug` shows.
    """


class FileError(DarexError):
    """A file that is missing, damaged or of the wrong kind; the message names it."""


class DarexWarning(UserWarning):
    """A request that was carried out but is probably a mistake; the command line shows it as one line."""
