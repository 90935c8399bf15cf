"""Text to token store, and token store to batches: a batch is a pure function of (recipe, seed, step)."""
