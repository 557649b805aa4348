"""`scripts/lab soak --drain`: a host leaves a working Linux guest and comes back; in between the guest is checked on the others."""

import json
import time

from . import guestrun, working
from .common import Failure, say
from .soakmoves import migrate

DRAIN_LIMIT = 900
"""Seconds for a drain or an addition, the emulation included."""
CHECK_LIMIT = 3600
"""Seconds until the guest's checks have ended."""
USE_LIMIT = 120
"""Seconds until a member that was added has pages."""
LEAVES = 1
"""The member that leaves: neither the one with the disk, whose image no other host has, nor the coordinator's."""


def _member(guest, number):
    return next((member for member in guest.info()["members"] if member["id"] == number), None)


def _faults(member):
    return sum(count for name, count in member["faults"].items() if name.endswith("_remote"))


def _used(guest, number):
    """Waits until `spanvm info` shows pages there that faults brought; returns what it shows."""
    end = time.monotonic() + USE_LIMIT
    while True:
        member = _member(guest, number)
        if member and member["memory_held"] and _faults(member):
            return member
        if time.monotonic() > end:
            raise Failure(f"member {number} has been added and is not used after {USE_LIMIT} s: {member}")
        time.sleep(2)


def soak_drain(new_lab, plan, budget):
    """Drains a member, checks the guest, adds it again, and shows that it is used; prints a line of JSON."""
    if plan.members < 3:
        raise Failure("--drain: over at least -n 3 hosts, so that two are left")
    plan.run = f"load --only atomics,time -- --min-nodes {plan.members} --budget {budget} --deadline 1800"
    plan.disk_mib = 16
    # Of the guest's time, before it powers off: the host comes back in it.
    plan.linger = DRAIN_LIMIT
    report = {}

    def work(guest):
        host = f"{guest.lab.hosts[LEAVES].ip}:{guestrun.PORT}"
        homes = [vcpu for vcpu, at in enumerate(guest.info()["vcpus"]) if at == LEAVES]
        rounds = guest.count("LOAD-ROUND")
        drained = guest.command(f"member drain {guestrun.VM} {LEAVES} --limit 10", DRAIN_LIMIT)
        say(f"    member {LEAVES} on {host} has left: {drained['pages']} pages, {drained['total_ms'] / 1000:.1f} s")
        if _member(guest, LEAVES) or LEAVES in guest.info()["vcpus"]:
            raise Failure(f"spanvm info still shows member {LEAVES}")
        # One round may have begun before.
        guest.wait("LOAD-ROUND", CHECK_LIMIT, rounds + 2)
        guest.type("enough")
        guest.wait("SPANVM-END", CHECK_LIMIT)
        added = guest.command(f"member add {guestrun.VM} {host}", DRAIN_LIMIT)
        member = added["member"]
        migrate(guest, homes, member)
        again = _used(guest, member)
        if [guest.info()["vcpus"][vcpu] for vcpu in homes] != [member] * len(homes):
            raise Failure(f"spanvm info does not show vCPU {homes} on member {member}")
        say(f"    member {member} on {host} is back: {again['memory_held'] >> 20} MiB, {_faults(again)} remote faults")
        guest.type("")
        report.update(drain=drained, added=added, used={key: again[key] for key in ("vcpus", "memory_home", "memory_held", "faults")})
    load, checks = working.soak(new_lab, plan, "soak-drain.log", work)
    print(json.dumps({"soak": "drain", "members": plan.members, "cpus": plan.cpus, "load": load, "conformance": checks, **report}))
    return 0
