"""The command line of scripts/lab."""

import argparse
import json
import os
import shlex
import sys
import threading

from . import guestrun, measure
from . import lab as labs
from .common import TARGET, Failure, main, replace_file, say

DESCRIPTION = """\
Virtual hosts with /dev/kvm, for running spanvm over several machines on one.

  scripts/lab up -n 2                        boot h1 and h2 (10.77.0.1, 10.77.0.2)
  scripts/lab exec h1 -- ping -c 3 h2        run a command in one; its exit code is ours
  scripts/lab exec all -- 'uname -a; nproc'  run a shell script in all of them
  scripts/lab exec h1 -- 'setsid spanvm node >/tmp/node.log 2>&1 &'   leave a daemon behind
  scripts/lab down                           end them
  scripts/lab run -n 3 -- CMD                up, run CMD in h1, down
  scripts/lab soak --boots 10                boot the Linux guest over them ten times, and judge its console
  scripts/lab soak --moves 100               move its vCPUs between hosts while it works, then check it
  scripts/lab soak --drain -n 3              let a host leave and come back while it works, and check it in between
  scripts/lab soak --checkpoint -n 3         save it while it works, kill everything, and let it go on over other numbers of hosts
  scripts/lab soak --cuts 20 -n 3            save the bare-metal guest at random moments, kill everything, and let its counts go on
  scripts/lab bench boot --json              its boot over two hosts against one, and where remote faults come from

The hosts run Debian's stock kernel and busybox. In each of them
  /opt/spanvm  (first in PATH)  spanvm, ssicheck, kernel (ELF), vmlinuz, initramfs, as of the last build
  /repo                         this repository, read-only (--cpu amd)
  /tmp, /dev/shm, /run          memory
"""

# Longest time of a guest that works while it is moved about, in seconds.
AT_WORK = 5400


def _parser():
    parser = argparse.ArgumentParser(prog="scripts/lab", description=DESCRIPTION,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    machine = argparse.ArgumentParser(add_help=False)
    machine.add_argument("-n", type=int, default=2, metavar="N", help="number of hosts (default 2)")
    machine.add_argument("--cpu", choices=["amd", "intel"], default="amd",
                         help="amd: QEMU, page walks count as writes; intel: Bochs, they do not, slower (default amd)")
    machine.add_argument("--memory", type=int, default=1024, metavar="MIB", help="of each host (default 1024)")
    machine.add_argument("--smp", type=int, default=1, metavar="N", help="CPUs of each host (default 1)")
    machine.add_argument("--accel", choices=["tcg", "kvm"], help="instead of the best that works")
    machine.add_argument("--boot-deadline", type=int, default=0, metavar="S", help="seconds a boot may take")
    name = argparse.ArgumentParser(add_help=False)
    name.add_argument("--name", default="default", help="which lab, when there are several")
    limits = argparse.ArgumentParser(add_help=False)
    limits.add_argument("--timeout", type=int, default=600, metavar="S", help="kill the command after (default 600)")
    limits.add_argument("--stdin", action="store_true", help="hand our standard input to the command")

    commands.add_parser("up", parents=[machine, name], help="boot hosts and leave them running")
    execute = commands.add_parser("exec", parents=[name, limits], help="run a command in HOST or all")
    execute.add_argument("host", help="h1, h2, ... or all")
    execute.add_argument("argv", nargs=argparse.REMAINDER, metavar="-- CMD")
    run = commands.add_parser("run", parents=[machine, name, limits], help="boot hosts, run a command, end them")
    run.add_argument("--on", default="h1", metavar="HOST", help="where: h1, ... or all (default h1)")
    run.add_argument("argv", nargs=argparse.REMAINDER, metavar="-- CMD")
    commands.add_parser("down", parents=[name], help="end the hosts")
    commands.add_parser("status", parents=[name], help="which hosts there are")

    guest = argparse.ArgumentParser(add_help=False)
    guest.add_argument("--guest-cpus", type=int, metavar="N", help="CPUs of the guest (default: one per host)")
    guest.add_argument("--guest-memory", type=int, default=512, metavar="MIB", help="of the guest (default 512)")
    guest.add_argument("--guest-timeout", type=int, default=0, metavar="S", help="kill a guest after")
    guest.add_argument("--slow-clock", type=int, default=0, metavar="N",
                       help="the guest's clock takes N seconds for one (default: 10 with --cpu intel, 4 with three or more hosts, else 1)")
    guest.add_argument("--guest-args", default="", metavar="TEXT", help="more of the guest's kernel command line")
    guest.add_argument("--launch-args", default="", metavar="TEXT", help="more options of spanvm launch")
    soak = commands.add_parser("soak", parents=[machine, name, guest], help="boot the Linux guest over the hosts, many times")
    soak.add_argument("--boots", type=int, default=10, metavar="N", help="how often (default 10)")
    soak.add_argument("--moves", type=int, metavar="N", help="instead: boot once, move vCPUs so often while the guest works, then check it")
    soak.add_argument("--drain", action="store_true", help="instead: boot once, let a host leave and come back while the guest works, and check it")
    soak.add_argument("--checkpoint", action="store_true",
                      help="instead: boot once over all hosts but one, save it while it works, kill everything, go on over all hosts, the same "
                           "again, go on over one, and check it")
    soak.add_argument("--cuts", type=int, metavar="N",
                      help="instead: boot the bare-metal guest, which counts, over all hosts but one, and N times: save it, kill everything while it "
                           "is saved again, go on from the cut over all, and again from it over one; the same from there back to all but one")
    soak.add_argument("--seed", type=int, default=1, metavar="S",
                      help="of --moves: which vCPU moves when; of --checkpoint and --cuts: when it is saved and killed (default 1)")
    soak.add_argument("--budget", type=int, default=15, metavar="S",
                      help="of --moves, --drain and --checkpoint: seconds for each check of ssicheck (default 15)")
    soak.add_argument("--guest-run", default="poweroff", metavar="CMD", help="what the guest runs, such as 'ssicheck' (default: nothing)")
    soak.add_argument("--fresh-hosts", action="store_true", help="new virtual hosts for every boot")
    bench = commands.add_parser("bench", parents=[machine, name, guest], help="measure the Linux guest over the hosts")
    bench.add_argument("what", choices=["boot"])
    bench.add_argument("--runs", type=int, default=1, metavar="N", help="boots of each kind; the median counts (default 1)")
    bench.add_argument("--check", default="", metavar="CMD", help="what the guest runs after the last boot, such as 'ssicheck'")
    bench.add_argument("--json", action="store_true", help="JSON instead of a table")
    return parser


def _new(options):
    if not 1 <= options.n <= 9:
        raise Failure(f"-n {options.n}: 1 to 9 hosts")
    if not 256 <= options.memory <= 65536:
        raise Failure(f"--memory {options.memory}: 256 to 65536 MiB")
    if not 1 <= options.smp <= 16:
        raise Failure(f"--smp {options.smp}: 1 to 16 CPUs")
    return labs.Lab(name=options.name, cpu=options.cpu, accel=options.accel or "", count=options.n,
                    memory=options.memory, smp=options.smp, boot_deadline=options.boot_deadline)


def _script(argv):
    """One argument is a shell script; several are one command, quoted as they are."""
    argv = argv[1:] if argv[:1] == ["--"] else argv
    if not argv:
        raise Failure("no command: put it behind --")
    return argv[0] if len(argv) == 1 else shlex.join(argv)


def execute(lab, where, script, timeout, stdin=None):
    """Runs a script in one host or in all, shows its output, and returns its exit code (the first that is not 0)."""
    if where != "all":
        def show(number, data):
            os.write(number, data)
        result = lab.run(where, script, timeout, on_output=show, stdin=stdin)
        if result.reason:
            say(f"{where}: {result.reason}")
        return result.code
    lock = threading.Lock()
    codes = {}

    def one(host):
        partial = {1: b"", 2: b""}

        def show(number, data):
            *lines, partial[number] = (partial[number] + data).split(b"\n")
            with lock:
                for line in lines:
                    os.write(number, host.name.encode() + b"| " + line + b"\n")
        try:
            result = lab.run(host, script, timeout, on_output=show)
            for number, rest in partial.items():
                if rest:
                    show(number, b"\n")
            codes[host.name] = result.code
            if result.code:
                say(f"{host.name}: exit code {result.code} {result.reason}")
        except Failure as failure:
            say(f"error: {failure}")
            codes[host.name] = 1
    threads = [threading.Thread(target=one, args=(host,), daemon=True) for host in lab.hosts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return next((code for _, code in sorted(codes.items()) if code), 0)


def _soak(options, plan):
    def new():
        return _new(options)

    if options.boots < 1:
        raise Failure(f"--boots {options.boots}: at least 1")
    if options.cuts is not None:
        if options.cuts < 1:
            raise Failure("--cuts: at least 1")
        return measure.soak_cuts(new, options.cuts, plan, options.seed)
    if options.moves is None and not options.drain and not options.checkpoint:
        plan.run = options.guest_run
        return measure.soak(new, options.boots, plan, options.fresh_hosts)
    plan.timeout = options.guest_timeout or AT_WORK
    if options.drain:
        return measure.soak_drain(new, plan, options.budget)
    if options.checkpoint:
        return measure.soak_checkpoint(new, plan, options.seed, options.budget)
    if options.moves < 1 or options.n < 2:
        raise Failure("--moves: at least 1, over at least -n 2 hosts")
    return measure.soak_moves(new, options.moves, plan, options.seed, options.budget)


def _measure(options):
    """soak and bench: labs of their own, one after the other."""
    if options.name == "default":
        options.name = f"{options.command}-{os.getpid()}"
    plan = guestrun.Plan(
        members=options.n, cpus=options.guest_cpus or options.n, memory_mib=options.guest_memory, extra=options.guest_args,
        slow_clock=options.slow_clock, options=shlex.split(options.launch_args),
        timeout=options.guest_timeout or (1800 if options.cpu == "intel" else 600))
    if options.command == "soak":
        return _soak(options, plan)
    if options.n < 2 or options.runs < 1:
        raise Failure("bench boot compares one member with several: -n 2 or more, --runs 1 or more")
    report = measure.bench_boot(lambda: _new(options), plan, options.runs, options.check)
    text = json.dumps(report, indent=1)
    replace_file(TARGET / f"bench-boot-{options.cpu}.json", text.encode() + b"\n")
    if options.json:
        print(text)
    else:
        measure.print_boot(report)
    return 0


def _main():
    options = _parser().parse_args()
    if not options.name.replace("-", "").replace("_", "").isalnum():
        raise Failure(f"--name {options.name!r}: letters, digits, - and _ only")
    stdin = sys.stdin.fileno() if getattr(options, "stdin", False) else None
    if options.command == "up":
        labs.up(_new(options))
        return 0
    if options.command == "exec":
        return execute(labs.load(options.name), options.host, _script(options.argv), options.timeout, stdin)
    if options.command == "run":
        script = _script(options.argv)
        if options.name == "default":
            options.name = f"run-{os.getpid()}"
        with labs.running(_new(options)) as lab:
            return execute(lab, options.on, script, options.timeout, stdin)
    if options.command == "down":
        labs.down(options.name)
        return 0
    if options.command in ("soak", "bench"):
        return _measure(options)
    for name in labs.names():
        known = labs.load(name)
        print(f"{name}: {known.count} x {known.cpu} ({known.accel})")
        for process in known.processes:
            address = next((host.ip for host in known.hosts if host.name == process.what), "")
            print(f"  {process.what:8} {address:10} pid {process.pid} {'up' if process.alive() else 'DEAD'}")
    return 0


if __name__ == "__main__":
    main(_main)
