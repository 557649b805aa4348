"""Reading a guest's console."""

import unittest

from spanlab import console

GOOD = """\
[    0.5] printk: legacy console\r
SPANVM-INIT uptime_s=3.25\r
SPANVM-GUEST nproc=4 numa_nodes=2 mem_mib=480 kernel=6.1.0-56-amd64 node0=cpus:0-1/mib:240 node1=cpus:2-3/mib:239\r
SPANVM-BEGIN ssicheck --json\r
{"process_space": "pass"}\r
SPANVM-END status=0\r
"""


class Console(unittest.TestCase):
    """spanlab.console"""

    def test_a_good_boot(self):
        self.assertEqual(console.init_uptime(GOOD), 3.25)
        facts = console.facts(GOOD)
        self.assertEqual((facts["nproc"], facts["numa_nodes"], facts["mem_mib"]), (4, 2, 480))
        self.assertEqual(facts["nodes"]["node1"], {"cpus": "2-3", "mib": "239"})
        output, status = console.run_output(GOOD)
        self.assertEqual(status, 0)
        self.assertEqual(console.json_objects(output), [{"process_space": "pass"}])
        self.assertEqual(console.complaints(GOOD), [])

    def test_a_boot_that_hangs(self):
        for cut in range(0, len(GOOD), 7):
            _, status = console.run_output(GOOD[:cut])
            self.assertIsNone(status, cut) if cut < GOOD.index("status=") else None
        self.assertIsNone(console.facts("SPANVM-GUEST nproc=x"))
        self.assertIsNone(console.init_uptime(""))

    def test_complaints(self):
        for line in ("watchdog: BUG: soft lockup - CPU#1 stuck for 22s!", "rcu: INFO: rcu_preempt detected stalls",
                     "clocksource: timekeeping watchdog on CPU1: Marking clocksource 'tsc' as unstable",
                     "smpboot: CPU 3 did not come online: -1", "WARNING: CPU: 0 PID: 1 at kernel/time.c:1",
                     "Kernel panic - not syncing"):
            self.assertEqual(len(console.complaints(f"fine\n[  1.0] {line}\nfine")), 1, line)


if __name__ == "__main__":
    unittest.main()
