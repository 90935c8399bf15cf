"""One file per job, of the same name."""
