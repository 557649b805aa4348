"""What a guest's console says: the lines of guest-images/linux/init, and the kernel's complaints."""

import json
import re

COMPLAINTS = [
    "soft lockup", "hard LOCKUP", "rcu: INFO", "rcu_sched self-detected", "rcu_preempt detected", "detected stalls",
    "clocksource: timekeeping watchdog", "Marking clocksource", "TSC unstable", "did not come online", "failed to report alive",
    "do_boot_cpu failed", "WARNING:", "BUG:", "Oops", "general protection fault", "Call Trace:", "Kernel panic",
    "blocked for more than", "hrtimer: interrupt took", "NMI watchdog", "APIC error", "Unhandled", "irq 4: nobody cared",
    "nobody cared", "init: no /",
]
"""Substrings of kernel (and init) messages that mean that something is wrong with the machine below the guest."""


def clean(text):
    """The console's text without carriage returns and escape sequences."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", text)


def complaints(text):
    """Lines in which the guest's kernel complains."""
    return [line.strip() for line in clean(text).splitlines() if any(word in line for word in COMPLAINTS)]


def init_uptime(text):
    """Guest seconds from the kernel's start to its first process, or None when it did not get there."""
    found = re.search(r"SPANVM-INIT uptime_s=([0-9.]+)", text)
    return float(found.group(1)) if found else None


def facts(text):
    """What the guest sees of its machine, or None when it did not say: nproc, numa_nodes, mem_mib, kernel, nodes."""
    found = re.search(r"SPANVM-GUEST (.*)", clean(text))
    if not found:
        return None
    words = dict(word.split("=", 1) for word in found.group(1).split() if "=" in word)
    try:
        nodes = {name: dict(part.split(":", 1) for part in value.split("/"))
                 for name, value in words.items() if re.fullmatch(r"node\d+", name)}
        return {"nproc": int(words["nproc"]), "numa_nodes": int(words["numa_nodes"]), "mem_mib": int(words["mem_mib"]),
                "kernel": words["kernel"], "nodes": nodes}
    except (KeyError, ValueError):
        return None


def run_output(text):
    """Output and exit code of the command that init ran; the code is None while it has not ended."""
    text = clean(text)
    begin = re.search(r"SPANVM-BEGIN [^\n]*\n", text)
    if not begin:
        return "", None
    end = re.search(r"SPANVM-END status=(\d+)", text[begin.end():])
    if not end:
        return text[begin.end():], None
    return text[begin.end():begin.end() + end.start()], int(end.group(1))


def json_objects(text):
    """All JSON objects that start at the beginning of a line; the kernel may write lines of its own between them."""
    decoder = json.JSONDecoder()
    found = []
    for match in re.finditer(r"^\{", text, re.MULTILINE):
        try:
            value, _ = decoder.raw_decode(text, match.start())
            found.append(value)
        except ValueError:
            continue
    return found
