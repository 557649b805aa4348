"""A Linux guest at work on virtual hosts, in a thread of its own, while somebody does things to the VM."""

import json
import re
import threading
import time

from . import console, guestrun
from . import lab as labs
from .common import TARGET, Failure, replace_file, say

READY_LIMIT = 600
"""Seconds from the launch until the guest's load runs."""


class Guest:
    """The guest, and its console as it comes, for who waits for a line."""

    def __init__(self, lab):
        self.lab = lab
        self.lines = []
        self.ended = threading.Event()
        self.outcome = None
        self.problem = None
        self.runner = None

    def boot(self, plan):
        """Boots it."""
        self._start(lambda: guestrun.boot(guestrun.Virtual(self.lab), plan, self._show))

    def go_on(self, argv, plan):
        """Lets a guest that has ended go on with `spanvm ARGV`."""
        self._start(lambda: guestrun.attend(guestrun.Virtual(self.lab), argv, plan, self._show, self.outcome))

    def _start(self, run):
        def follow():
            try:
                self.outcome = run()
            except Failure as failure:
                self.problem = failure
            finally:
                self.ended.set()
        self.ended.clear()
        self.runner = threading.Thread(target=follow, daemon=True)
        self.runner.start()

    def _show(self, line):
        self.lines.append(line)
        if line.startswith(("LOAD-", "SPANVM-")) or console.complaints(line):
            say(f"    guest| {line[:200]}")

    def count(self, word):
        """How many lines begin like this."""
        return sum(line.startswith(word) for line in self.lines)

    def check_load(self):
        """Raises `Failure` if something went wrong in what it runs."""
        if self.count("LOAD-FAIL"):
            raise Failure("a check failed in the guest")

    def wait(self, word, limit, times=1):
        """Waits until so many lines began like this; raises `Failure` when the guest ends first, or at the limit."""
        end = time.monotonic() + limit
        while self.count(word) < times:
            if self.ended.wait(0.5):
                raise Failure(f"the guest ended before it said {word}")
            if time.monotonic() > end:
                raise Failure(f"the guest did not say {word} within {limit} s")

    def command(self, words, limit):
        """`spanvm WORDS --json` on the first host; returns what it reports."""
        return json.loads(guestrun.spanvm(self.lab, f"{words} --json", limit).text)

    def info(self):
        """`spanvm info --json`."""
        return self.command(f"info {guestrun.VM}", 60)

    def type(self, text):
        """Types a line on the guest's console."""
        self.lab.run("h1", f"spanvm console {guestrun.VM} --send '{text}'", 60)


def soak(new_lab, plan, log, work):
    """Boots the guest with `load` as what it runs, lets `work(guest)` do things to it, and judges it when it has ended.

    Returns what the load did and ssicheck's results; `log` is the file in `TARGET` that gets the console.
    """
    with labs.running(new_lab()) as lab:
        guest = Guest(lab)
        guest.boot(plan)
        failure = None
        try:
            guest.wait("LOAD-READY", READY_LIMIT)
            work(guest)
        except Failure as problem:
            failure = problem
            lab.run("h1", f"spanvm stop {guestrun.VM} --force", 60)
        guest.runner.join(plan.timeout)
    outcome = guest.outcome
    if outcome:
        replace_file(TARGET / log, (outcome.text + "\n--- spanvm\n" + outcome.errors).encode())
    if failure or guest.problem:
        raise Failure(f"{failure or guest.problem}; console in {TARGET / log}")
    outcome.check()
    done = re.search(r"LOAD-DONE (.*)", console.clean(outcome.text))
    checks = next((found for found in console.json_objects(outcome.text) if "conformance" in found), {}).get("conformance", {})
    bad = [name for name, result in checks.items() if result != "pass"]
    if not done or not checks or bad:
        raise Failure(f"{', '.join(bad) or 'ssicheck reported nothing'}; console in {TARGET / log}")
    return done.group(1), checks
