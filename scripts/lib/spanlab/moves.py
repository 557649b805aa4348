"""vCPUs that move between members, and pauses, while a guest on this machine works."""

import json
import shlex
import subprocess
import threading

from . import guestrun
from .common import Failure


def _spanvm(binary, *argv):
    return subprocess.run([str(binary), *argv], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True, check=False, timeout=60)


def _ended(done, wait):
    return done.wait(wait)


def while_running(binary, command, name, members, timeout):
    """Runs `command`, which launches the VM `name`, and moves its vCPUs round and round until it ends.

    Returns the result of the command and the downtimes of all moves in microseconds. A move that fails while the guest
    runs on is a failure.
    """
    outcome = {}
    done = threading.Event()

    def run():
        try:
            outcome["result"] = guestrun.Local(binary).sh("exec " + shlex.join(command), timeout)
        finally:
            done.set()
    runner = threading.Thread(target=run, daemon=True)
    runner.start()
    downtimes = []
    failed = None
    turn = 0
    while not _ended(done, 0.05):
        info = _spanvm(binary, "info", name, "--json")
        if info.returncode or (seen := json.loads(info.stdout))["status"] != "running":
            continue
        places = seen["vcpus"]
        target = turn % members
        wanted = [str(vcpu) for vcpu, at in enumerate(places) if at != target]
        # Now one, now all at once; every tenth time the VM stands still for a moment instead.
        wanted = wanted if turn % 3 == 0 else wanted[:1]
        turn += 1
        if turn % 10 == 0:
            steps = [_spanvm(binary, "pause", name), _spanvm(binary, "resume", name)]
        elif wanted:
            steps = [_spanvm(binary, "vcpu", "migrate", name, *wanted, "--to", str(target), "--json")]
        else:
            continue
        bad = next((step for step in steps if step.returncode), None)
        if bad is None:
            if steps[0].stdout.startswith("{"):
                downtimes += [move["downtime_us"] for move in json.loads(steps[0].stdout)["moves"]]
        elif not _ended(done, 3):
            # It was not the end of the guest that got in the way.
            failed = bad.stderr.strip()
            _spanvm(binary, "stop", name)
            break
    runner.join(timeout)
    if failed:
        raise Failure(f"after {len(downtimes)} moves: {failed}")
    if "result" not in outcome:
        raise Failure(f"{name} did not end")
    return outcome["result"], downtimes
