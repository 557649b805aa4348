"""Reading the counting guest's heartbeat."""

import unittest

from spanlab import beats
from spanlab.common import Failure

GOOD = """\
BARE loop BEGIN base=0x1001000 pages=40 ranges=1 cpus=3\r
BARE loop BEAT seconds=8 passes=30 least=29 disk=0 wrong=0\r
BARE loop BEAT seconds=9 passes=31 least=30 disk=0 wrong=0\r
BARE loop BEAT seconds=9 passes=32 lea"""


class Beats(unittest.TestCase):
    """spanlab.beats"""

    def test_a_guest_that_counts(self):
        self.assertEqual(beats.read(GOOD), [beats.Beat(8, 30, 29), beats.Beat(9, 31, 30)], "not the half line")
        self.assertEqual(beats.read(""), [])

    def test_a_page_that_is_older_than_the_others(self):
        with self.assertRaisesRegex(Failure, "7 times a page was older"):
            beats.read(GOOD + "st=31 disk=0 wrong=7\r\n")

    def test_a_guest_that_gives_up(self):
        with self.assertRaisesRegex(Failure, "gave up: BARE loop FAIL cpu=1"):
            beats.read('BARE loop FAIL cpu=1 error="waited in vain for its turn"\n')


if __name__ == "__main__":
    unittest.main()
