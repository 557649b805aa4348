"""`scripts/lab soak --moves`: vCPUs of the Linux guest move between virtual hosts while it works; then it is checked."""

import json
import random
import re
import threading
import time

from . import console, guestrun
from . import lab as labs
from .common import TARGET, Failure, replace_file, say

MOVE_LIMIT = 120
"""Seconds for one `spanvm vcpu migrate`, the emulation included."""
READY_LIMIT = 600
"""Seconds from the launch until the guest's load runs."""


class _Guest:
    """The guest's console as it comes, for who waits for a line."""

    def __init__(self):
        self.lines = []
        self.ended = threading.Event()
        self.outcome = None
        self.problem = None

    def show(self, line):
        """Takes a line of the console."""
        self.lines.append(line)
        if line.startswith(("LOAD-", "SPANVM-")) or console.complaints(line):
            say(f"    guest| {line[:200]}")

    def has(self, word):
        """Whether such a line came."""
        return any(line.startswith(word) for line in self.lines)

    def wait(self, word, limit):
        """Waits for a line; raises `Failure` when the guest ends first, or at the limit."""
        end = time.monotonic() + limit
        while not self.has(word):
            if self.ended.wait(0.5):
                raise Failure(f"the guest ended before it said {word}")
            if time.monotonic() > end:
                raise Failure(f"the guest did not say {word} within {limit} s")


def _migrate(lab, vcpus, target):
    """Moves vCPUs; returns the report's moves."""
    words = " ".join(map(str, vcpus))
    result = lab.run("h1", f"spanvm vcpu migrate {guestrun.VM} {words} --to {target} --json", MOVE_LIMIT)
    if result.code:
        raise Failure(f"vCPU {words} to member {target}: exit code {result.code} {result.reason} {result.stderr.decode(errors='replace').strip()}")
    return json.loads(result.text)["moves"]


def _places(lab):
    result = lab.run("h1", f"spanvm info {guestrun.VM} --json", 60)
    if result.code:
        raise Failure(f"spanvm info: {result.stderr.decode(errors='replace').strip()}")
    return json.loads(result.text)["vcpus"]


def _move_about(lab, guest, plan, moves, seed):
    """Moves vCPUs back and forth, one or all at once, until there were `moves`; returns the downtimes in microseconds."""
    chance = random.Random(seed)
    downtimes = []
    while len(downtimes) < moves:
        places = _places(lab)
        target = chance.randrange(plan.members)
        away = [vcpu for vcpu, at in enumerate(places) if at != target]
        if not away:
            continue
        chosen = away if chance.random() < 0.3 else [chance.choice(away)]
        downtimes += [move["downtime_us"] for move in _migrate(lab, chosen[:moves - len(downtimes)], target)]
        if len(downtimes) % 10 < len(chosen):
            say(f"    {len(downtimes)} of {moves} moves")
        if guest.has("LOAD-FAIL"):
            raise Failure("a check failed in the guest")
        if guest.ended.wait(chance.uniform(0.2, 3)):
            raise Failure("the guest ended by itself")
    # Home again, so that the checks at the end go over all members.
    for vcpu, (at, home) in enumerate(zip(_places(lab), guest.homes, strict=True)):
        if at != home:
            _migrate(lab, [vcpu], home)
    return downtimes


def soak_moves(new_lab, moves, plan, seed, budget):
    """Moves vCPUs of a working guest `moves` times, and checks it afterwards; prints a line of JSON."""
    plan.run = f"load --min-nodes {plan.members} --budget {budget} --deadline 900"
    plan.disk_mib = 16
    guest = _Guest()
    downtimes = []
    with labs.running(new_lab()) as lab:
        def run():
            try:
                guest.outcome = guestrun.boot(guestrun.Virtual(lab), plan, guest.show)
            except Failure as failure:
                guest.problem = failure
            finally:
                guest.ended.set()
        runner = threading.Thread(target=run, daemon=True)
        runner.start()
        failure = None
        try:
            guest.wait("LOAD-READY", READY_LIMIT)
            guest.homes = _places(lab)
            downtimes = _move_about(lab, guest, plan, moves, seed)
            lab.run("h1", f"spanvm console {guestrun.VM} --send enough", 60)
        except Failure as problem:
            failure = problem
            lab.run("h1", f"spanvm stop {guestrun.VM} --force", 60)
        runner.join(plan.timeout)
    outcome = guest.outcome
    if outcome:
        replace_file(TARGET / "soak-moves.log", (outcome.text + "\n--- spanvm\n" + outcome.errors).encode())
    if failure or guest.problem:
        raise Failure(f"after {len(downtimes)} moves (seed {seed}): {failure or guest.problem}; console in {TARGET / 'soak-moves.log'}")
    outcome.check()
    done = re.search(r"LOAD-DONE (.*)", console.clean(outcome.text))
    checks = next((found for found in console.json_objects(outcome.text) if "conformance" in found), {}).get("conformance", {})
    bad = [name for name, result in checks.items() if result != "pass"]
    if not done or not checks or bad:
        raise Failure(f"after {moves} moves: {', '.join(bad) or 'ssicheck reported nothing'}")
    downtimes.sort()
    print(json.dumps({"soak": "moves", "moves": moves, "members": plan.members, "cpus": plan.cpus, "seed": seed,
                      "load": done.group(1), "conformance": checks,
                      "downtime_ms": {"p50": downtimes[len(downtimes) // 2] / 1000, "max": downtimes[-1] / 1000}}))
    return 0
