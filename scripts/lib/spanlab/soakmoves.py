"""`scripts/lab soak --moves`: vCPUs of the Linux guest move between virtual hosts while it works; then it is checked."""

import json
import random

from . import guestrun, working
from .common import Failure, say

MOVE_LIMIT = 120
"""Seconds for one `spanvm vcpu migrate`, the emulation included."""


def migrate(guest, vcpus, target):
    """Moves vCPUs; returns the report's moves."""
    return guest.command(f"vcpu migrate {guestrun.VM} {' '.join(map(str, vcpus))} --to {target}", MOVE_LIMIT)["moves"]


def _move_about(guest, plan, moves, seed):
    """Moves vCPUs back and forth, one or all at once, until there were `moves`; returns the downtimes in microseconds."""
    chance = random.Random(seed)
    homes = guest.info()["vcpus"]
    downtimes = []
    while len(downtimes) < moves:
        places = guest.info()["vcpus"]
        target = chance.randrange(plan.members)
        away = [vcpu for vcpu, at in enumerate(places) if at != target]
        if not away:
            continue
        chosen = away if chance.random() < 0.3 else [chance.choice(away)]
        downtimes += [move["downtime_us"] for move in migrate(guest, chosen[:moves - len(downtimes)], target)]
        if len(downtimes) % 10 < len(chosen):
            say(f"    {len(downtimes)} of {moves} moves")
        guest.check_load()
        if guest.ended.wait(chance.uniform(0.2, 3)):
            raise Failure("the guest ended by itself")
    # Home again, so that the checks at the end go over all members.
    for vcpu, (at, home) in enumerate(zip(guest.info()["vcpus"], homes, strict=True)):
        if at != home:
            migrate(guest, [vcpu], home)
    return downtimes


def soak_moves(new_lab, moves, plan, seed, budget):
    """Moves vCPUs of a working guest `moves` times, and checks it afterwards; prints a line of JSON."""
    plan.run = f"load --min-nodes {plan.members} --budget {budget} --deadline 900"
    plan.disk_mib = 16
    downtimes = []

    def work(guest):
        downtimes.extend(_move_about(guest, plan, moves, seed))
        guest.type("enough")
    try:
        load, checks = working.soak(new_lab, plan, "soak-moves.log", work)
    except Failure as failure:
        raise Failure(f"after {len(downtimes)} moves (seed {seed}): {failure}") from failure
    downtimes.sort()
    print(json.dumps({"soak": "moves", "moves": moves, "members": plan.members, "cpus": plan.cpus, "seed": seed,
                      "load": load, "conformance": checks,
                      "downtime_ms": {"p50": downtimes[len(downtimes) // 2] / 1000, "max": downtimes[-1] / 1000}}))
    return 0
