"""Runs that measure accuracy and speed. Not part of the packages, and not timed in the tests."""
