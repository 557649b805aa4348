"""The command line of scripts/test: every check and test, each under a deadline, and a table at the end."""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import unittest
from dataclasses import dataclass
from pathlib import Path

from . import checkpoints, console, guestrun, images, moves, quickstart
from . import kernel as debian
from . import lab as labs
from .common import ROOT, TARGET, Failure, call, main, need_tool, packages, replace_file, say

BUDGET = 25 * 60
"""Seconds for everything on two cores, a build from nothing included."""
LAB_BUDGET = 20
"""Seconds for ssicheck in the lab."""
SIM_SEEDS = 10000
SIM_BUDGET = 2 * 60
"""Seconds for the simulation's seeds."""
BARE_TESTS = "counter pages private touch litmus tsc ipi ipimodes timer".split()
BARE_GUESTS = [(2, 2), (3, 4)]
"""Members and CPUs of the bare-metal guests."""


class Skip(Exception):
    """A step that this machine cannot run, and why."""


@dataclass
class Row:
    """How a step ended."""
    step: str
    result: str
    seconds: float
    note: str = ""


def _tools(_left):
    packages("gcc", "libc6-dev", "libclang-dev", "binutils", "busybox-static", "qemu-system-x86")
    need_tool("cargo", "install Rust from https://rustup.rs")
    for tool in ("fmt", "clippy"):
        if subprocess.run(["cargo", tool, "--version"], capture_output=True, check=False, timeout=60).returncode:
            call(["rustup", "component", "add", "rustfmt" if tool == "fmt" else tool], 300)


def _scripts(left):
    for path in sorted(ROOT.glob("scripts/*")) + sorted(ROOT.glob("guest-images/*/*")) + [ROOT / ".ci" / "run"]:
        if path.is_file() and path.read_bytes().startswith(b"#!/bin/sh"):
            call(["sh", "-n", path], 20, f"syntax of {path.relative_to(ROOT)}", quiet=True)
    for path in sorted((ROOT / "scripts" / "lib").rglob("*.py")):
        compile(path.read_text(encoding="utf-8"), str(path), "exec")
    suite = unittest.defaultTestLoader.discover(str(ROOT / "scripts" / "lib" / "tests"))
    if not unittest.TextTestRunner(sys.stderr).run(suite).wasSuccessful() or left <= 0:
        raise Failure("the scripts' own tests failed")


def _fmt(left):
    call(["cargo", "fmt", "--all", "--check"], min(left, 120))
    if _bare().is_file():
        call(["cargo", "fmt", "--check", "--manifest-path", _bare()], min(left, 120))


def _clippy(left):
    call(["cargo", "clippy", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"], min(left, 900))
    if _bare().is_file():
        call(["cargo", "clippy", "--locked", "--manifest-path", _bare(), "--", "-D", "warnings"], min(left, 300), cwd=_bare().parent)


def _unit(left):
    if shutil.which("cargo-nextest"):
        call(["cargo", "nextest", "run", "--workspace", "--locked", "--no-fail-fast"], min(left, 1200), "cargo nextest")
    else:
        call(["cargo", "test", "--workspace", "--locked", "--no-fail-fast"], min(left, 1200), "cargo test")


def _sim(left):
    binary = images.build_static("spanvm") / "spanvm"
    call([binary, "sim", "--seeds", SIM_SEEDS], min(left, SIM_BUDGET), f"spanvm sim --seeds {SIM_SEEDS}")


def _seeded(left):
    call(["cargo", "test", "--locked", "-p", "spanvm-dsm", "--features", "seeded-faults", "--lib", "seeded"], min(left, 600),
         "cargo test of the seeded faults")


def _deny(left):
    if not shutil.which("cargo-deny"):
        raise Skip("cargo-deny is not installed")
    if not (ROOT / "deny.toml").is_file():
        raise Skip("no deny.toml")
    call(["cargo", "deny", "--offline", "check", "bans", "licenses", "sources"], min(left, 120), "cargo deny")


def _bare():
    return ROOT / "guest-images" / "bare" / "Cargo.toml"


def _bare_build(left):
    call(["cargo", "test", "--lib", "--locked", "--manifest-path", _bare()], min(left, 300),
         "unit tests of the bare-metal guest", cwd=_bare().parent)
    images.bare(max(5, min(left, 300)))


def _bare_launch(binary, elf, members, cpus, iterations):
    return [str(binary), "launch", "--name", f"test-{os.getpid()}", "--kernel", elf, "--members", str(members),
            "--cpus", str(cpus), "--memory", "128M", "--rng", "off",
            "--cmdline", f"test={','.join(BARE_TESTS)} cpus={cpus} deadline=60 iterations={iterations} rounds=10"]


def _bare_judge(result, what):
    sys.stderr.write(result.text + result.stderr.decode(errors="replace"))
    passed = [line.split()[1] for line in console.clean(result.text).splitlines() if re.match(r"BARE \S+ PASS", line)]
    missing = [test for test in BARE_TESTS if test not in passed]
    if result.code or missing:
        raise Failure(f"bare-metal guest, {what}: exit code {result.code} {result.reason}; "
                      f"no PASS of {', '.join(missing) or 'nothing'}")


def _bare_run(left):
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        raise Skip("no /dev/kvm, or no permission to use it")
    elf = images.bare(max(5, min(left, 300)))
    binary = images.build_static("spanvm", "ssicheck", "labagent") / "spanvm"
    deadline = time.monotonic() + left
    for members, cpus in BARE_GUESTS:
        result = guestrun.Local(binary).sh("exec " + shlex.join(_bare_launch(binary, elf, members, cpus, 200)), min(left, 180))
        _bare_judge(result, f"{members} members")
    moved = []
    for members, cpus in BARE_GUESTS:
        command = _bare_launch(binary, elf, members, cpus, 1000)
        result, downtimes = moves.while_running(binary, command, f"test-{os.getpid()}", members,
                                                min(max(5, deadline - time.monotonic()), 180))
        _bare_judge(result, f"{members} members, {len(downtimes)} moves of vCPUs")
        moved += downtimes
    if not moved:
        raise Failure("no vCPU was moved while the bare-metal guests ran")
    say(f"{len(moved)} moves of vCPUs, median downtime {sorted(moved)[len(moved) // 2]:.0f} us")
    saved = checkpoints.there_and_back(binary, elf, f"test-{os.getpid()}", min(max(5, deadline - time.monotonic()), 180))
    say(saved)
    return (f"{len(BARE_TESTS)} tests on each of {len(BARE_GUESTS)} guests over several members, {len(moved)} moves of vCPUs, "
            f"{saved}")


def _lab(left):
    return _lab_guest(left, 1)


def _cluster(left):
    return _lab_guest(left, 2)


def _lab_guest(left, members):
    plan = guestrun.Plan(run=f"ssicheck --json --min-nodes {members} --budget {LAB_BUDGET}", disk_mib=16, linger=15,
                         timeout=int(min(left, 720)), members=members)
    kernel = debian.get()
    images.guest(kernel, images.build_static("spanvm", "ssicheck"))
    with labs.running(labs.Lab(name=f"test-{os.getpid()}", count=members)) as lab:
        outcome = guestrun.boot(guestrun.Virtual(lab), plan, lambda line: say(f"guest| {line[:160]}"))
    outcome.check()
    found = quickstart.report("lab", plan, outcome)
    quickstart.judge(found, plan)
    return f"all CPUs after {found['boot_s']} s, {found['remote_faults']} remote faults, {len(found['conformance'])} checks"


@dataclass
class Step:
    """One step of the run."""
    name: str
    what: str
    function: object
    by_name_only: bool = False


STEPS = [
    Step("tools", "install Debian packages and Rust components that are missing", _tools),
    Step("scripts", "syntax and unit tests of the scripts", _scripts),
    Step("fmt", "cargo fmt --check", _fmt),
    Step("clippy", "cargo clippy, warnings are errors", _clippy),
    Step("deny", "licences and sources of dependencies", _deny),
    Step("unit", "cargo tests of the workspace", _unit),
    Step("sim", "the page engine in simulated clusters, 10000 seeds", _sim),
    Step("seeded", "bugs put in on purpose: the model and the simulation must notice each", _seeded),
    Step("bare-build", "build the bare-metal guest", _bare_build),
    Step("bare", "bare-metal guests over several members on /dev/kvm, their vCPUs moving; checkpoints of one", _bare_run),
    Step("lab", "a virtual host, Linux guest with two CPUs in it, ssicheck", _lab),
    # Where page walks count as writes this takes longer than all other steps together; see docs/status.md.
    Step("cluster", "two virtual hosts, Linux guest over both, ssicheck", _cluster, by_name_only=True),
]


def _run(steps):
    """Runs steps in order; a failure does not keep the others from running."""
    rows = []
    end = time.monotonic() + BUDGET
    for step in steps:
        start = time.monotonic()
        say(f"\n##### {step.name}: {step.what}")
        try:
            left = end - start
            if left < 5:
                raise Failure(f"no time left of the {BUDGET // 60} minutes for all steps")
            note = step.function(left)
            rows.append(Row(step.name, "pass", 0, note or ""))
        except Skip as skip:
            rows.append(Row(step.name, "skip", 0, str(skip)))
        except (Failure, SyntaxError, OSError, subprocess.SubprocessError) as failure:
            rows.append(Row(step.name, "FAIL", 0, str(failure)))
        rows[-1].seconds = round(time.monotonic() - start, 1)
        say(f"##### {step.name}: {rows[-1].result} {rows[-1].note}")
    return rows


def _main():
    parser = argparse.ArgumentParser(prog="scripts/test", description="Runs every check and test and prints a table. "
                                     "Exit code 0 when none failed; what this machine cannot run is skipped, with the reason.")
    parser.add_argument("steps", nargs="*", metavar="STEP", help="only these (default: all)")
    parser.add_argument("--list", action="store_true", help="list the steps")
    parser.add_argument("--skip", action="append", default=[], metavar="STEP", help="all but this one; may be repeated")
    options = parser.parse_args()
    known = {step.name: step for step in STEPS}
    for name in options.steps + options.skip:
        if name not in known:
            raise Failure(f"no step {name}: there are {', '.join(known)}")
    if options.list:
        for step in STEPS:
            print(f"{step.name:12} {step.what}{' (only by name)' if step.by_name_only else ''}")
        return 0
    start = time.monotonic()
    names = options.steps or [step.name for step in STEPS if not step.by_name_only]
    rows = _run([known[n] for n in names if n not in options.skip])
    width = max(len(row.step) for row in rows)
    print(f"\n{'step':{width}}  result  seconds  note")
    for row in rows:
        print(f"{row.step:{width}}  {row.result:6}  {row.seconds:7.1f}  {row.note}")
    failed = [row.step for row in rows if row.result == "FAIL"]
    total = time.monotonic() - start
    print(f"\n{len(rows) - len(failed)} of {len(rows)} steps without failure in {total / 60:.1f} min"
          + (f"; FAILED: {', '.join(failed)}" if failed else ""))
    replace_file(TARGET / "test.json", json.dumps([vars(row) for row in rows], indent=1).encode() + b"\n")
    return 1 if failed else 0


if __name__ == "__main__":
    main(_main)
