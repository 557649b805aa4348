"""The heartbeat of the bare-metal guest's `loop`, in which the pages count up together."""

import re
from dataclasses import dataclass

from . import console
from .common import Failure

_BEAT = re.compile(r"BARE loop BEAT seconds=(\d+) passes=(\d+) least=(\d+) .*\bwrong=(\d+)")


@dataclass
class Beat:
    """One line of it."""
    seconds: int
    """By the guest's clock, since its start."""
    passes: int
    """Of the first CPU."""
    least: int
    """Passes of the slowest CPU."""


def read(text):
    """All beats on a console; raises `Failure` if the guest saw a page that was older or newer than the others, or gave up."""
    beats = []
    text = console.clean(text)
    for line in text.splitlines():
        if found := _BEAT.match(line):
            seconds, passes, least, wrong = map(int, found.groups())
            if wrong:
                raise Failure(f"{wrong} times a page was older or newer than the others: {line}")
            beats.append(Beat(seconds, passes, least))
        elif line.startswith("BARE") and " FAIL" in line:
            raise Failure(f"the guest gave up: {line}")
    return beats
