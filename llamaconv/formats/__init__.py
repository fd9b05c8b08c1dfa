"""One small module a format: how a folder opens to pieces, and how a target is written."""
