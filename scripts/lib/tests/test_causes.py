"""What a guest page holds."""

import unittest

from spanlab import causes

KALLSYMS = """\
0000000000000000 A fixed_percpu_data
ffffffff81000000 T _text
ffffffff81000000 T startup_64
ffffffff81001000 T schedule
ffffffff82000000 T _etext
ffffffff82a10000 D init_top_pgt
ffffffff82a11000 D jiffies
ffffffff82a11100 D tick_lock
ffffffff84a00000 B _end
ffffffffc0000000 t in_a_module\t[virtio]
"""


class Causes(unittest.TestCase):
    """spanlab.causes"""

    def setUp(self):
        self.guest = causes.Guest(causes.parse_symbols(KALLSYMS), causes.parse_tables("x\nSPANVM-PT 5000-5002,6000\r\n"))

    def test_each_kind(self):
        for gpa, cause, what in ((0x1001234, "code", "schedule"), (0x2A11040, "data", "jiffies, tick_lock"),
                                 (0x2A10000, "walk", "init_top_pgt"), (0x5001000, "walk", "page table"),
                                 (0x5003000, "data", "allocated"), (0x6000FFF, "walk", "page table"), (0x7000, "data", "first MiB")):
            found = self.guest.cause(gpa)
            self.assertEqual(found[0], cause, hex(gpa))
            self.assertIn(what, found[1], hex(gpa))

    def test_split_adds_up(self):
        sums, rows = causes.split(self.guest, {0x1001000: 3, 0x5000000: 10, 0x9000000: 4})
        self.assertEqual(sums, {"walk": 10, "data": 4, "code": 3})
        self.assertEqual([row["count"] for row in rows], [10, 4, 3])


if __name__ == "__main__":
    unittest.main()
