"""Which weights to keep: score x allocation x schedule, each a plain function."""
