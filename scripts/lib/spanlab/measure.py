"""`scripts/lab soak` and `scripts/lab bench`: many boots, and what a boot over two hosts costs."""

import json
import statistics
import time

from . import causes, console, guestrun, images, soakcheckpoint, soakcuts, soakdrain, soakmoves
from . import kernel as debian
from . import lab as labs
from .common import TARGET, Failure, replace_file, say


def _ready():
    """Builds what the guest and the hosts run."""
    kernel = debian.get()
    images.guest(kernel, images.build_static("spanvm", "ssicheck"))


def soak(new_lab, boots, plan, fresh_hosts):
    """Boots the guest `boots` times; returns how many were good, and prints a line for each."""
    _ready()
    good = 0
    failures = []

    def one(lab, number):
        outcome = guestrun.boot(guestrun.Virtual(lab), plan)
        try:
            outcome.check()
            if (outcome.facts["nproc"], outcome.facts["numa_nodes"]) != (plan.cpus, plan.members):
                raise Failure(f"the guest sees {outcome.facts['nproc']} CPUs on {outcome.facts['numa_nodes']} nodes")
        except Failure as failure:
            log = TARGET / f"soak-{number}.log"
            replace_file(log, (outcome.text + "\n--- spanvm\n" + outcome.errors).encode())
            say(f"boot {number} of {boots}: BAD: {failure}\n    (all of it: {log})")
            failures.append(number)
            return 0
        say(f"boot {number} of {boots}: good; init after {outcome.init_s:.1f} s, all CPUs after {outcome.ready_s:.1f} s, all {outcome.total_s:.1f} s")
        return 1

    if fresh_hosts:
        for number in range(1, boots + 1):
            with labs.running(new_lab()) as lab:
                good += one(lab, number)
    else:
        with labs.running(new_lab()) as lab:
            for number in range(1, boots + 1):
                good += one(lab, number)
    print(json.dumps({"soak": "boot", "boots": boots, "good": good, "bad": failures, "members": plan.members,
                      "cpus": plan.cpus}))
    return 0 if good == boots else 1


def soak_moves(new_lab, moves, plan, seed, budget):
    """See `soakmoves`."""
    _ready()
    return soakmoves.soak_moves(new_lab, moves, plan, seed, budget)


def soak_drain(new_lab, plan, budget):
    """See `soakdrain`."""
    _ready()
    return soakdrain.soak_drain(new_lab, plan, budget)


def soak_checkpoint(new_lab, plan, seed, budget):
    """See `soakcheckpoint`."""
    _ready()
    return soakcheckpoint.soak_checkpoint(new_lab, plan, seed, budget)


def soak_cuts(new_lab, rounds, plan, seed):
    """See `soakcuts`."""
    _ready()
    return soakcuts.soak_cuts(new_lab, rounds, plan, seed)


def _faults(outcome):
    """Remote faults by kind over all members, and how often each page moved."""
    kinds, pages = {}, {}
    for member in (outcome.boot_info or outcome.info).get("members", []):
        for kind, count in member.get("faults", {}).items():
            kinds[kind] = kinds.get(kind, 0) + count
        for hot in _find(member, "hot_pages") or []:
            pages[hot["gpa"]] = pages.get(hot["gpa"], 0) + hot["count"]
    return kinds, pages


def _find(value, key):
    """The first value of a key anywhere in an object."""
    if isinstance(value, dict):
        if key in value:
            return value[key]
        value = list(value.values())
    for part in value if isinstance(value, list) else []:
        found = _find(part, key)
        if found is not None:
            return found
    return None


def bench_boot(new_lab, plan, runs, check=""):
    """Boots on one member and on several, same CPUs and memory; returns the report.

    After the last boot the guest runs `check`, if there is one: its faults are not counted.
    """
    _ready()
    plan.run = "pagetables"
    # `nokaslr` lets a page of the kernel's image be named by its symbols.
    plan.extra = "nokaslr"
    plan.linger = 30
    plan.mark = "SPANVM-PT"
    # What the CPUs of a boot do to each other is what this measures.
    plan.all_cpus_boot = True
    times = {1: [], plan.members: []}
    guest = causes.Guest()
    last = None

    def show(line):
        if line.startswith("SPANVM-") or console.complaints(line):
            say(f"    guest| {line[:160]}")
    with labs.running(new_lab()) as lab:
        guest.symbols = causes.parse_symbols(lab.run("h1", "cat /proc/kallsyms", 120).text)
        where = guestrun.Virtual(lab)
        # One clock for both, or the time that a boot waits without computing would differ.
        plan.slow_clock = slow = where.slow_clock(plan)
        for run in range(runs):
            for members in (plan.members, 1):
                one = guestrun.Plan(**{**vars(plan), "members": members})
                if check and members > 1 and run + 1 == runs:
                    # A while for the counters to be read.
                    one.run += f"; sleep {2 * where.look_s // slow + 1}; {check}"
                outcome = guestrun.boot(where, one, show)
                outcome.check()
                times[members].append({"wall_s": outcome.init_s, "guest_s": console.init_uptime(outcome.text) * slow})
                say(f"run {run + 1} of {runs}, {members} member{'s'[:members > 1]}: init after {outcome.init_s:.1f} s "
                    f"({times[members][-1]['guest_s']:.1f} s by the guest's clock)")
                if members > 1:
                    last = outcome
        accel = lab.accel
    guest.tables = causes.parse_tables(last.text)
    kinds, pages = _faults(last)
    by_cause, rows = causes.split(guest, pages)

    def median(members, key):
        return round(statistics.median(one[key] for one in times[members]), 2)
    return {
        "bench": "boot", "cpu": new_lab().cpu, "accel": accel, "members": plan.members, "cpus": plan.cpus,
        "memory_mib": plan.memory_mib, "runs": runs, "kernel": last.facts["kernel"],
        "init_s": {"one": median(1, "wall_s"), "several": median(plan.members, "wall_s")},
        "init_guest_s": {"one": median(1, "guest_s"), "several": median(plan.members, "guest_s")},
        "ratio": round(median(plan.members, "wall_s") / median(1, "wall_s"), 2),
        "remote_faults": sum(count for kind, count in kinds.items() if kind.endswith("_remote")), "faults": kinds,
        "moves_by_cause": by_cause, "moves_listed": sum(pages.values()), "top_pages": rows[:40],
        "when": time.strftime("%Y-%m-%d"),
    }


def print_boot(report):
    """The report as a table."""
    print(f"boot to init, {report['cpus']} CPUs, {report['memory_mib']} MiB, --cpu {report['cpu']}: "
          f"1 member {report['init_s']['one']} s, {report['members']} members {report['init_s']['several']} s, "
          f"ratio {report['ratio']}")
    print(f"remote faults: {report['remote_faults']}; moves of the listed pages: " + ", ".join(
        f"{cause} {count}" for cause, count in report["moves_by_cause"].items()))
    print(f"{'page':>12} {'moves':>7}  cause  what")
    for row in report["top_pages"][:20]:
        print(f"{row['gpa']:>12} {row['count']:>7}  {row['cause']:5}  {row['what']}")
