"""The command line of scripts/quickstart: builds, boots Debian's kernel over two members, checks it from inside, reports."""

import argparse
import json
import os
from pathlib import Path

from . import console, guestrun, images
from . import kernel as debian
from . import lab as labs
from .common import TARGET, Failure, Step, main, need_tool, packages, replace_file, say


def can_run_linux():
    """Whether this machine's KVM boots Linux: (yes or no, why).

    A CPU flag and the module that goes with it: KVM's software variants have a /dev/kvm too, and cannot.
    """
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    flags = set(text.split("flags", 1)[-1].split("\n", 1)[0].split())
    flag = next((flag for flag in ("vmx", "svm") if flag in flags), None)
    if not flag:
        return False, "the CPU shows neither VT-x (vmx) nor AMD-V (svm)"
    module, paging = {"vmx": ("kvm_intel", "ept"), "svm": ("kvm_amd", "npt")}[flag]
    parameter = Path(f"/sys/module/{module}/parameters/{paging}")
    if not parameter.exists():
        return False, f"the CPU has {flag}, but {module} is not loaded"
    if parameter.read_text(encoding="utf-8").strip() not in ("Y", "1"):
        return False, f"{module} runs without nested paging ({paging}=0)"
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False, f"no permission to use /dev/kvm (add {os.environ.get('USER', 'yourself')} to group kvm)"
    return True, f"{flag} and {module} with {paging}"


def _boot(mode, plan, options):
    """Boots the plan where `mode` says; returns the outcome."""
    def show(line):
        if line.strip() and not line.startswith(("{", " ", "}")):
            say(f"    guest| {line}")
    if mode == "kvm":
        with Step(f"Linux over {plan.members} members on this machine"):
            return guestrun.boot(guestrun.Local(images.IMAGES / "bin" / "spanvm"), plan, show)
    lab = labs.Lab(name=f"quickstart-{os.getpid()}", count=plan.members, memory=options.host_memory)
    with labs.running(lab), Step(f"Linux over {plan.members} virtual hosts"):
        return guestrun.boot(guestrun.Virtual(lab), plan, show)


def report(mode, plan, outcome):
    """The object of target/quickstart.json."""
    facts = outcome.facts or {}
    output, _ = console.run_output(outcome.text)
    checks = next((found for found in console.json_objects(output) if "conformance" in found), {})
    return {
        "mode": mode,
        "members": plan.members,
        "cpus": facts.get("nproc", 0),
        "numa_nodes": facts.get("numa_nodes", 0),
        "mem_mib": facts.get("mem_mib", 0),
        "boot_s": round(outcome.ready_s or 0, 1),
        "kernel": facts.get("kernel", ""),
        "kernel_package": debian.get().package,
        "remote_faults": outcome.remote_faults,
        "conformance": checks.get("conformance", {}),
        "conformance_details": checks.get("details", {}),
        "total_s": round(outcome.total_s, 1),
    }


def judge(found, plan):
    """Raises `Failure` when the report is not that of one machine over all members."""
    wrong = []
    for key, wanted in (("cpus", plan.cpus), ("numa_nodes", plan.members)):
        if found[key] != wanted:
            wrong.append(f"the guest sees {key}={found[key]}, not {wanted}")
    if not found["conformance"]:
        wrong.append("ssicheck reported nothing")
    wrong += [f"{name}: {result}" for name, result in found["conformance"].items() if result != "pass"]
    if plan.members > 1 and found["remote_faults"] <= 0:
        wrong.append("no page fault was answered by another member: nothing was shared")
    if wrong:
        raise Failure("; ".join(wrong))


def _table(found, outcome):
    say("")
    say(f"{'':12} {'the guest says':>16} {'spanvm info says':>18}")
    info = outcome.info
    members = info.get("members", [])
    rows = [("CPUs", found["cpus"], info.get("cpus", "?")),
            ("nodes", found["numa_nodes"], f"{len(members)} members"),
            ("memory", f"{found['mem_mib']} MiB", f"{info.get('memory', 0) >> 20} MiB")]
    for name, guest, vmm in rows:
        say(f"{name:12} {guest!s:>16} {vmm!s:>18}")
    for name, result in found["conformance"].items():
        say(f"{name:20} {result}")
    if outcome.info_text:
        say("")
        say(outcome.info_text.rstrip())


def _main():
    parser = argparse.ArgumentParser(
        prog="scripts/quickstart", description="Builds spanvm and a Linux guest with Debian's stock kernel, boots it over "
        "several members (on this machine's KVM where that can run Linux, else on virtual hosts), runs ssicheck inside, "
        "prints what the guest sees beside what spanvm says, and writes target/quickstart.json.")
    parser.add_argument("--mode", choices=["kvm", "lab"], help="instead of what this machine can do")
    parser.add_argument("--members", type=int, default=2, metavar="N", help="members, one per host (default 2)")
    parser.add_argument("--cpus", type=int, metavar="N", help="CPUs of the guest (default: one per member in the lab, else two)")
    parser.add_argument("--memory", type=int, default=512, metavar="MIB", help="of the guest (default 512)")
    parser.add_argument("--host-memory", type=int, default=1024, metavar="MIB", help="of each virtual host (default 1024)")
    parser.add_argument("--budget", type=int, metavar="S", help="seconds for ssicheck (default 60)", default=60)
    parser.add_argument("--deadline", type=int, metavar="S",
                        help="for each step of ssicheck (default: ssicheck's own; 900 with three or more virtual hosts)")
    parser.add_argument("--slow-clock", type=int, default=0, metavar="N",
                        help="the guest's clock takes N seconds for one (default 1; 4 with three or more virtual hosts)")
    parser.add_argument("--guest-args", default="", metavar="TEXT", help="more of the guest's kernel command line")
    parser.add_argument("--timeout", type=int, metavar="S",
                        help="for the guest's whole life (default 2400; 5400 with three or more virtual hosts)")
    options = parser.parse_args()
    if not 1 <= options.members <= 9:
        raise Failure(f"--members {options.members}: 1 to 9")
    able, why = can_run_linux()
    mode = options.mode or ("kvm" if able else "lab")
    say(f"mode: {mode} ({why if not options.mode else 'as asked'})"
        + ("; two virtual hosts stand in for two machines" if mode == "lab" and not options.mode else ""))
    found_path = TARGET / "quickstart.json"
    found_path.unlink(missing_ok=True)

    with Step("installing what is missing"):
        packages("gcc", "libc6-dev", "libclang-dev", "binutils", "busybox-static")
        need_tool("cargo", "install Rust from https://rustup.rs")
    kernel = debian.get()
    programs = images.build_static("spanvm", "ssicheck")
    with Step(f"making the guest: Linux {kernel.release}, initramfs"):
        images.guest(kernel, programs)
    # Three emulated hosts on two processors, whose guest's page tables are written to by every walk, take turns for minutes.
    is_crowded = mode == "lab" and options.members > 2
    deadline = options.deadline or (900 if is_crowded else 0)
    slow = options.slow_clock or (guestrun.fitting_clock("amd", options.members) if mode == "lab" else 1)
    plan = guestrun.Plan(members=options.members, cpus=options.cpus or options.members * (2 if mode == "kvm" else 1),
                         memory_mib=options.memory, disk_mib=16, linger=60,
                         timeout=options.timeout or (5400 if is_crowded else 2400), extra=options.guest_args,
                         slow_clock=slow,
                         run=f"ssicheck --json --min-nodes {options.members} --budget {max(options.budget // slow, 10)}"
                             + (f" --deadline {deadline}" if deadline else ""))
    outcome = _boot(mode, plan, options)
    found = report(mode, plan, outcome)
    _table(found, outcome)
    replace_file(found_path, json.dumps(found, indent=1).encode() + b"\n")
    replace_file(TARGET / "quickstart-console.log", outcome.text.encode())
    outcome.check()
    judge(found, plan)
    say(f"\nAll checks passed. Report: {found_path}")
    return 0


if __name__ == "__main__":
    main(_main)
