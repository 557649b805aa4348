"""`scripts/lab soak --checkpoint`: a working Linux guest is saved, all its processes are killed, and it goes on from the cut on another
number of hosts; in the end it is checked."""

import json
import random
import time

from . import guestrun, working
from .common import Failure, say

FOLDER = "/run/checkpoints"
"""On the first host, which every restore has."""
CHECKPOINT = f"checkpoint {guestrun.VM} --to {FOLDER} --limit 10"
"""Of spanvm; options may follow."""
SAVE_LIMIT = 300
"""Seconds for a checkpoint, the emulation included."""
END_LIMIT = 60
"""Seconds until who shows the guest's console has noticed that it is gone."""
ROUND_LIMIT = 1800
"""Seconds until the guest has gone once more through the checks of its load."""
KILL = "kill -9 $(pidof spanvm) 2>/dev/null; rm -f /run/node.pid"
"""Members, coordinator, node daemon, and whatever else of it runs."""


def _save(guest, *options):
    """Makes a checkpoint; returns its report."""
    return guest.command(" ".join([CHECKPOINT, *options]), SAVE_LIMIT)


def _kill(guest, delay):
    """Kills everything on all hosts, the first one while it has been writing another checkpoint for `delay` seconds."""
    writer = f"spanvm {CHECKPOINT} --full >/dev/null 2>&1 &"
    guest.lab.run("h1", f"{writer} sleep {delay:.2f}; {KILL}", 60)
    for host in guest.lab.hosts[1:]:
        # Members go by themselves when their coordinator does.
        guest.lab.run(host, KILL, 60)
    if not guest.ended.wait(END_LIMIT):
        raise Failure("everything was killed, and the guest's console goes on")


def _works(guest):
    """Waits until a round of the load's checks has ended well, most often the one that was under way at the cut."""
    guest.wait("LOAD-ROUND", ROUND_LIMIT, guest.count("LOAD-ROUND") + 1)
    guest.check_load()


def _there_and_back(guest, plan, counts, chance):
    """Saves and kills the guest and lets it go on over so many hosts, one number after the other; returns the reports."""
    stages = []
    for count in counts:
        reports = []
        for options in (["--full"], []):
            time.sleep(chance.uniform(0.5, 5))
            reports.append(_save(guest, *options))
        _kill(guest, chance.uniform(0, 2))
        guestrun.start_nodes(guest.lab)
        start = time.monotonic()
        guest.go_on(["restore", FOLDER, "--name", guestrun.VM, *guestrun.on(guest.lab.hosts[:count])], plan)
        _works(guest)
        members = [member["id"] for member in guest.info()["members"]]
        if len(members) != count:
            raise Failure(f"spanvm info shows members {members} after a restore on {count}")
        say(f"    on {count} hosts: a round of checks after {time.monotonic() - start:.0f} s")
        stages.append({"members": count, "checkpoints": reports})
    return stages


def soak_checkpoint(new_lab, plan, seed, budget):
    """Over all but one host, then over all, then on one; prints a line of JSON."""
    hosts = plan.members
    if hosts < 3:
        raise Failure("--checkpoint: over at least -n 3 hosts: the guest begins on all but one, goes on over all, then on one")
    # A member has a vCPU at least, and the clock must suit the most hosts.
    plan.members, plan.cpus = hosts - 1, max(plan.cpus, hosts)
    plan.slow_clock = plan.slow_clock or guestrun.fitting_clock(new_lab().cpu, hosts)
    plan.run = f"load --only atomics,time -- --min-nodes {plan.members} --budget {budget} --deadline 1800"
    report = {}

    def work(guest):
        report["stages"] = _there_and_back(guest, plan, [hosts, 1], random.Random(seed))
        guest.type("enough")
    load, checks = working.soak(new_lab, plan, "soak-checkpoint.log", work)
    print(json.dumps({"soak": "checkpoint", "members": plan.members, "cpus": plan.cpus, "seed": seed, "load": load, "conformance": checks, **report}))
    return 0
