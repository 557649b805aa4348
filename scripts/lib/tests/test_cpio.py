"""The archive writer against the format's rules."""

import unittest

from spanlab.cpio import Archive


def entries(data):
    """Name -> (mode, contents), read back by the rules of newc; checks alignment on the way."""
    found, at = {}, 0
    while True:
        assert at % 4 == 0 and data[at:at + 6] == b"070701", at
        fields = [int(data[at + 6 + 8 * n:at + 14 + 8 * n], 16) for n in range(13)]
        start = at + 110
        name = data[start:start + fields[11] - 1].decode()
        body = start + fields[11] + (-(110 + fields[11]) % 4)
        if name == "TRAILER!!!":
            return found
        assert name not in found, name
        found[name] = (fields[1], data[body:body + fields[6]])
        at = body + fields[6] + (-fields[6] % 4)


class Cpio(unittest.TestCase):
    """Archive.bytes()."""

    def test_parents_come_first_and_once(self):
        archive = Archive()
        archive.file("/a/b/one", b"1")
        archive.file("/a/b/two", b"22", 0o644)
        archive.link("/a/l", "b/one")
        found = entries(archive.bytes())
        self.assertEqual(list(found), ["a", "a/b", "a/b/one", "a/b/two", "a/l"])
        self.assertEqual(found["a/b/two"], (0o100644, b"22"))
        self.assertEqual(found["a/l"], (0o120777, b"b/one"))

    def test_same_input_same_bytes_and_padding_for_a_second_archive(self):
        def build():
            archive = Archive()
            archive.char_device("/dev/console", 5, 1)
            return archive.bytes()
        self.assertEqual(build(), build())
        self.assertEqual(len(build()) % 512, 0)

    def test_bytes_may_be_asked_for_twice(self):
        archive = Archive()
        archive.directory("/x")
        self.assertEqual(archive.bytes().count(b"TRAILER"), 1)
        self.assertEqual(archive.bytes().count(b"TRAILER"), 1)


if __name__ == "__main__":
    unittest.main()
