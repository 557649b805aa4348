"""Runs of a guest."""

import unittest

from spanlab import agent, guestrun


class Hosts:
    """Hosts on which every `spanvm` command says the same."""

    command = "spanvm"
    look_s = 60

    def __init__(self, code, *pieces):
        self.code, self.pieces = code, pieces

    def sh(self, script, _timeout, on_output=None):
        """As `guestrun.Virtual.sh`."""
        result = agent.Result()
        if on_output:
            self.script = script
            for piece in self.pieces:
                on_output(1, piece.encode())
            result.code, result.reason = self.code, ""
        return result


class Guestrun(unittest.TestCase):
    """spanlab.guestrun"""

    def test_a_guest_that_is_killed_and_goes_on(self):
        lines = []
        plan = guestrun.Plan()
        killed = Hosts(-9, "SPANVM-INIT uptime_s=1\r\nROU", "ND 1\r\nROUND 2\r\nROU")
        outcome = guestrun.attend(killed, ["launch", "--name", "two words"], plan, lines.append)
        self.assertEqual(killed.script, "exec spanvm launch --name 'two words'")
        self.assertEqual(lines, ["SPANVM-INIT uptime_s=1", "ROUND 1", "ROUND 2"])
        self.assertEqual(outcome.code, -9)
        booted = outcome.init_s
        restored = Hosts(0, "ROUND 2\r\n", "ROUND 3\r\n")
        again = guestrun.attend(restored, ["restore", "/there"], plan, lines.append, outcome)
        self.assertIs(again, outcome)
        self.assertEqual(lines[3:], ["ROUND 2", "ROUND 3"], "not what was cut off in the middle")
        self.assertEqual((outcome.code, outcome.init_s), (0, booted))


if __name__ == "__main__":
    unittest.main()
