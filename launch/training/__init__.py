"""The training that every rank runs: build, loop, data, checkpoints."""
