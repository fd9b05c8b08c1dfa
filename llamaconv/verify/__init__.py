"""Checks that can fail, by independent readers."""
