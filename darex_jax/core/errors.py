"""The error for a person's mistakes, told apart from faults of this library or of those under it."""


class DarexError(ValueError):
    """What was given cannot be used; the message says what is wrong, where, and what to do.

    Everything this library raises on purpose about its input is one of these. The command line shows it as
    one line; any other exception is a fault, and keeps its traceback behind `darex --debug`.
    """


class FileError(DarexError):
    """A file that cannot be used as it is; the message is for the person who named it."""


class DarexWarning(UserWarning):
    """What was given is used, and the message says what about it may surprise."""
