"""Executing a plan: streamed, resumable, atomic."""
