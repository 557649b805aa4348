"""Tests of the scripts' library."""
