"""Commands `dysl` in one of several processes, with a signal at a step; `accelerate launch -m` starts it.

The word `then` is between two commands: starting processes takes longer than what they do here.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from itertools import groupby
from typing import Any

from accelerate.state import AcceleratorState
from torch.distributed import PrefixStore, TCPStore, init_process_group

from dysl_vla.cli import main
from dysl_vla.skip_controller.heads_trainer import HeadsTrainer

FAULT = "DYSL_TEST_FAULT"
"""Environment variable: rank, step and signal, of which SIGINT is sent to the launcher, as a terminal does.

It is for the last command.
"""
THEN = "then"


def send_at(rank: int, step: int, number: int) -> None:
    """Have a process end, or the launcher interrupted, as a step begins."""
    update = HeadsTrainer.update

    def updated(self: Any, *arguments: Any) -> Any:
        if self.step == step and int(os.environ["RANK"]) == rank:
            os.kill(os.getppid() if number == signal.SIGINT else os.getpid(), number)
            time.sleep(1.0)  # the others wait for this step's gradients, until the signal has arrived
        return update(self, *arguments)

    HeadsTrainer.update = updated  # type: ignore[method-assign]


def meet_again() -> None:
    """Join the processes again, under names that the last command has not used, as those of another launch do."""
    AcceleratorState._reset_state(reset_partial_state=True)
    environment = os.environ
    store = TCPStore(environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), is_master=False)
    rank, count = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    init_process_group("gloo", store=PrefixStore("again", store), rank=rank, world_size=count)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background may ignore it
    *first, last = [list(words) for is_then, words in groupby(sys.argv[1:], THEN.__eq__) if not is_then]
    for command in first:
        if code := main(command):
            sys.exit(code)
        meet_again()
    if fault := os.environ.get(FAULT):
        send_at(*map(int, fault.split()))
    sys.exit(main(last))
