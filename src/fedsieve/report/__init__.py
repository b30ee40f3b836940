"""What a run left behind: read it (`records`), tabulate it (`table`), draw it on one page (`page`)."""
