"""Commands on folders, and the name of a repository of the Hub, for tests of the network."""

MODEL = "hf://org/model"

# What README's "Five minutes" does, and the way to Meta's files.
COMMANDS = """\
sample tiny
inspect tiny
plan tiny
convert tiny dcp
verify tiny dcp
convert dcp hf
convert hf meta --to meta
verify meta"""
