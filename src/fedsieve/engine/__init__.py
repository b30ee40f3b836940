"""The rounds: loop, transports, checkpoints, run folders."""
