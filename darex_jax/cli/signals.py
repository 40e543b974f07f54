"""Ctrl-C and a request to end (SIGTERM, SIGHUP) unwind the stack, so that what is under way is cleaned up."""

import contextlib
import gc
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

AGAIN = 0.02  # seconds
UNINTERRUPTED = "_temporary"  # of files/atomic.py


@contextmanager
def unwinding() -> Iterator[None]:
    """While this lasts, SIGINT raises KeyboardInterrupt, SIGTERM and SIGHUP SystemExit(128 + their number).

    Not in the middle of an import, since native modules can crash of it, nor in a finalizer or a callback of
    the garbage collector, JAX's say, where the exception would be lost, nor while something temporary is made
    or removed, which would be left: there the signal is put off until these are done. Python calls some
    callbacks where no frame tells (a weak reference's); an exception lost there is raised again.
    Signals that somebody else handles or ignores (nohup) are left alone.
    """
    pending = 0
    reported = sys.unraisablehook

    def lost(unraisable: "sys.UnraisableHookArgs") -> None:
        if pending and unraisable.exc_type in (KeyboardInterrupt, SystemExit) and signal.SIGALRM in taken:
            signal.setitimer(signal.ITIMER_REAL, AGAIN)
        else:
            reported(unraisable)

    def leave(number: int, frame: FrameType | None) -> None:
        nonlocal pending
        pending = pending if number == signal.SIGALRM else number
        if _at_a_bad_moment(frame) and signal.SIGALRM in taken:
            signal.setitimer(signal.ITIMER_REAL, AGAIN)
        elif pending == signal.SIGINT:
            raise KeyboardInterrupt
        elif pending:
            raise SystemExit(128 + pending)

    taken = {}
    if threading.current_thread() is threading.main_thread():  # no other thread may
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                taken[number] = signal.signal(number, leave)
        sys.unraisablehook = lost
    try:
        yield
    finally:
        if sys.unraisablehook is lost:
            sys.unraisablehook = reported
        if signal.SIGALRM in taken:
            signal.setitimer(signal.ITIMER_REAL, 0)  # what is done needs no end
        for number, before in taken.items():
            signal.signal(number, before)


def _at_a_bad_moment(frame: FrameType | None) -> bool:
    collecting = {getattr(callback, "__code__", None) for callback in gc.callbacks}
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith("<frozen importlib") or code.co_name in (UNINTERRUPTED, "__del__"):
            return True
        if code in collecting:
            return True
        if code.co_name == "__enter__" and code.co_filename == contextlib.__file__:
            return True  # what it has begun is ended only once the block is entered
        frame = frame.f_back
    return False
