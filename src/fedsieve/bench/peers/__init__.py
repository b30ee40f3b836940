"""Rounds per second of fedsieve against other simulators, each in an environment of its own: `make bench-peers`."""
