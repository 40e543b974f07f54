"""Signal handling: SIGINT, SIGTERM and SIGHUP unwind the stack, so that unfinished work is cleaned up."""

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
    """Inside the block SIGINT raises KeyboardInterrupt, SIGTERM and SIGHUP SystemExit(128 + number).

    The signal is deferred during imports (native modules can crash), in finalizers and garbage collector
    callbacks such as JAX's (the exception would be lost), and while temporary files are created or removed
    (they would be left behind). Some callbacks (of weak references) cannot be recognised by their frame; an
    exception lost there is raised again. Signals that are already handled or ignored (nohup) are not changed.
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
    if threading.current_thread() is threading.main_thread():  # required by signal.signal
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
            signal.setitimer(signal.ITIMER_REAL, 0)  # cancel a deferred signal
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
            return True  # its cleanup runs only after the block is entered
        frame = frame.f_back
    return False
