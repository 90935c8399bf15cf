"""Data: text on disk, tokens in stores, batches of denoising examples."""
