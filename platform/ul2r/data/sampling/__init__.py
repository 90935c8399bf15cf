"""From a sample index to a batch."""
