"""`scripts/lab soak --cuts`: the bare-metal guest, whose pages count up together, is saved at random moments over virtual hosts, all its
processes are killed while another checkpoint is being written, and it goes on from the cut on other numbers of hosts."""

import json
import random
import re
import time
from pathlib import Path

from . import beats, guestrun, images
from . import lab as labs
from .common import TARGET, Failure, replace_file, say
from .soakcheckpoint import CHECKPOINT, END_LIMIT, FOLDER, KILL, SAVE_LIMIT

KERNEL = "/run/bare"
"""The guest, on the first host."""
BEAT_LIMIT = 120
"""Seconds for a pass of all CPUs over all pages, the emulation included."""
START_LIMIT = 120
"""Seconds for a launch or a restore."""
LOG = TARGET / "soak-cuts.log"


class _Guest:
    """The guest, and what it said since it was last started."""

    def __init__(self, lab):
        self.lab = lab
        self.log = []
        """What the runs before this one said."""
        self.text = ""

    def start(self, words, members):
        """Lets it run over so many hosts by `spanvm WORDS`; returns what spanvm said."""
        guestrun.start_nodes(self.lab)
        hosts = " ".join(guestrun.on(self.lab.hosts[:members]))
        result = guestrun.spanvm(self.lab, f"{words} --name {guestrun.VM} --detach {hosts}", START_LIMIT)
        said = result.stderr.decode(errors="replace")
        self.log.append(f"--- {words}\n{said}")
        return said

    def beat(self, least=-1):
        """Waits for a beat in which every CPU has more than so many passes; returns the first such."""
        end = time.monotonic() + BEAT_LIMIT
        while True:
            self.text = guestrun.spanvm(self.lab, f"console {guestrun.VM} --dump", 60).text
            if found := next((beat for beat in beats.read(self.text) if beat.least > least), None):
                return found
            if time.monotonic() > end:
                raise Failure(f"no heartbeat with more than {least} passes of each CPU within {BEAT_LIMIT} s")
            time.sleep(0.3)

    def last(self):
        """Its newest beat."""
        self.beat()
        return beats.read(self.text)[-1]

    def save(self, *options):
        """Makes a checkpoint; returns its report."""
        return json.loads(guestrun.spanvm(self.lab, " ".join([CHECKPOINT, "--json", *options]), SAVE_LIMIT).text)

    def kill_amid_checkpoint(self, chance):
        """Kills everything on all hosts, in any order, the first one while another checkpoint is being written."""
        delay = chance.uniform(0, 0.8)
        writer = f"spanvm {' '.join([CHECKPOINT, *_full(chance)])} >/dev/null 2>&1 &"
        order = chance.sample(self.lab.hosts, len(self.lab.hosts))
        if order[0].name == "h1":
            self.lab.run("h1", f"{writer} sleep {delay:.2f}; {KILL}", 60)
        else:
            self.lab.run("h1", writer, 60)
            time.sleep(delay)
        self.kill(order)

    def kill(self, order):
        """Kills everything on all hosts, one after the other."""
        self.log.append(self.text)
        self.text = ""
        for host in order:
            self.lab.run(host, KILL, 60)
        for host in order:
            left = f"for _ in $(seq {END_LIMIT}); do pidof spanvm || exit 0; sleep 1; done; exit 1"
            if self.lab.run(host, left, END_LIMIT + 30).code:
                raise Failure(f"everything was killed, and processes are left on {host.name}")

    def newest(self):
        """The number of the newest whole checkpoint, as its format has it: the highest folder without a dot."""
        return max(map(int, re.findall(r"^\d{8}$", self.lab.run("h1", f"ls {FOLDER}", 60).text, re.MULTILINE)), default=0)


def _full(chance):
    """Options of a checkpoint: more often than not it has only what has changed."""
    return ["--full"] if chance.random() < 0.3 else []


def _cut(guest, chance, cuts):
    """Saves the working guest at random moments, and kills it while it is saved again; returns the newest whole cut and what
    the guest had said before it."""
    # One after the other, so that what has changed since the last one counts, and not only since the guest was restored.
    for _ in range(chance.randint(1, 3)):
        time.sleep(chance.uniform(0, 2))
        before = guest.last()
        report = guest.save(*_full(chance))
        say(f"    checkpoint {Path(report['folder']).name} ({'full' if report['full'] else 'incremental'}, {report['pages']} pages, paused for "
            f"{report['pause_ms']:.0f} ms) at {before.passes} passes")
        cuts.append({"full": report["full"], "pause_ms": report["pause_ms"], "cut_short": False})
    number = int(Path(report["folder"]).name)
    # It runs on for a while, so that what a restored one does is not what this one was about to do.
    time.sleep(chance.uniform(0, 2))
    after = guest.last()
    guest.kill_amid_checkpoint(chance)
    newest = guest.newest()
    if newest not in (number, number + 1):
        raise Failure(f"checkpoint {number} was made, another one was begun, and the newest is {newest}")
    say(f"    killed at {after.passes} passes with the next one {'half ' if newest == number else ''}written")
    cuts[-1]["cut_short"] = newest == number
    # A writer that came to its end saved what came after `after`.
    return newest, before if newest == number else after


def _go_on(guest, newest, before, members):
    """Restores the guest over so many hosts; it must go on from that cut. Returns the seconds until it did."""
    start = time.monotonic()
    said = guest.start(f"restore {FOLDER}", members)
    if f"{FOLDER}/{newest:08}:" not in said:
        raise Failure(f"checkpoint {newest} is the newest, and the restore says:\n{said}")
    first = guest.beat()
    if first.passes < before.passes or first.least < before.least or first.seconds < before.seconds:
        raise Failure(f"the guest said {before} before the cut, and {first} after the restore on {members}")
    guest.beat(first.least + 2)
    took = time.monotonic() - start
    say(f"    restored on {members}: {first.passes} passes; goes on after {took:.0f} s")
    return took


def _round(guest, hosts, chance, cuts):
    """Saves it on all hosts but one, and lets it go on from that cut on all, and once more on one; saves it there, and lets it go on
    where it was. Returns the seconds of each restore."""
    newest, before = _cut(guest, chance, cuts)
    took = [_go_on(guest, newest, before, hosts)]
    guest.kill(guest.lab.hosts)
    took.append(_go_on(guest, newest, before, 1))
    newest, before = _cut(guest, chance, cuts)
    return [*took, _go_on(guest, newest, before, hosts - 1)]


def soak_cuts(new_lab, rounds, plan, seed):
    """`rounds` times: saved on all hosts but one, restored on all and on one, saved there, restored on all but one; prints a line of JSON."""
    hosts = plan.members
    if hosts < 3:
        raise Failure("--cuts: over at least -n 3 hosts: the guest begins on all but one, goes on over all, then on one")
    elf = Path(images.bare()).read_bytes()
    cpus = max(plan.cpus, hosts)
    cmdline = f"test=loop shared=1 pages=40 beat=100 deadline=3600 cpus={cpus} {plan.extra}".rstrip()
    options = f"--kernel {KERNEL} --cpus {cpus} --memory 64M --rng off --cmdline '{cmdline}' {' '.join(plan.options)}".rstrip()
    chance = random.Random(seed)
    cuts, took = [], []
    with labs.running(new_lab()) as lab:
        guest = _Guest(lab)
        try:
            lab.run("h1", f"cat >{KERNEL}", 60, stdin=elf)
            guest.start(f"launch {options}", hosts - 1)
            guest.beat()
            for number in range(rounds):
                say(f"round {number + 1} of {rounds}")
                took += _round(guest, hosts, chance, cuts)
        except Failure as failure:
            raise Failure(f"after {len(took)} of {3 * rounds} restores (seed {seed}): {failure}; consoles in {LOG}") from failure
        finally:
            replace_file(LOG, "\n".join([*guest.log, guest.text]).encode())
    pauses = sorted(cut["pause_ms"] for cut in cuts)
    took.sort()
    print(json.dumps({
        "soak": "cuts", "rounds": rounds, "seed": seed, "members": hosts - 1, "cpus": cpus, "checkpoints": len(cuts), "restores": len(took),
        "incremental": sum(not cut["full"] for cut in cuts), "writers_killed": 2 * rounds, "writers_cut_short": sum(cut["cut_short"] for cut in cuts),
        "pause_ms": {"p50": round(pauses[len(pauses) // 2], 1), "max": round(pauses[-1], 1)},
        "goes_on_after_s": {"p50": round(took[len(took) // 2], 1), "max": round(took[-1], 1)}}))
    return 0
