"""Exceptions for invalid input, as distinct from bugs in this library or its dependencies."""


class DarexError(ValueError):
    """Invalid input; the message says what is wrong, where, and how to fix it.

    Checks of input raise it, except that an argument of a wrong type is a TypeError and a diverged training
    a FloatingPointError. The command line shows it as one line, and other exceptions' tracebacks with
    `darex --debug`.
    """


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, at most 200 characters; its type if there is no message."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


class FileError(DarexError):
    """A file that is missing, damaged or of the wrong kind; the message names it."""


class DarexWarning(UserWarning):
    """A request that was carried out but is probably a mistake; the command line shows it as one line."""
