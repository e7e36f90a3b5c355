"""The command `dysl` in one of several processes, with a signal at a step; `accelerate launch -m` starts it."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from dysl_vla.cli import main
from dysl_vla.skip_controller.heads_trainer import HeadsTrainer

FAULT = "DYSL_TEST_FAULT"
"""Environment variable: rank, step and signal, of which SIGINT is sent to the launcher, as a terminal does."""


def send_at(rank: int, step: int, number: int) -> None:
    """Have a process end, or the launcher interrupted, as a step begins."""
    update = HeadsTrainer.update

    def updated(self: Any, *arguments: Any) -> Any:
        if self.step == step and int(os.environ["RANK"]) == rank:
            os.kill(os.getppid() if number == signal.SIGINT else os.getpid(), number)
            time.sleep(1.0)  # the others wait for this step's gradients, until the signal has arrived
        return update(self, *arguments)

    HeadsTrainer.update = updated  # type: ignore[method-assign]


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background may ignore it
    if fault := os.environ.get(FAULT):
        send_at(*map(int, fault.split()))
    sys.exit(main())
