"""Untrusted: bytes that others wrote, read as data. The one place to audit."""
