"""Ctrl-C during long work: it is answered between two steps, so that what was done can be kept."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupt:
    """Whether Ctrl-C was pressed.

    Attributes:
        is_requested: It was; the work should end after its present step.
    """

    def __init__(self) -> None:
        self.is_requested = False


@contextmanager
def deferred_interrupt() -> Iterator[Interrupt]:
    """Have the first Ctrl-C noted in the body, rather than raised; a second one is raised at once.

    The body looks at what is yielded after each step, saves its work, and raises `KeyboardInterrupt` itself. In another
    thread than the main one, where signals do not arrive, nothing changes.
    """
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return

    def note(number: int, frame: FrameType | None) -> None:
        if interrupt.is_requested:
            raise KeyboardInterrupt
        interrupt.is_requested = True
        print("\ninterrupted: saving after this step (once more stops at once)", file=sys.stderr)

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # it is ignored, or somebody else handles it
        yield interrupt
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)
