"""`python -m bench.replay`: the same as `pointsman replay`."""

from bench.replay.command import replay

replay()
