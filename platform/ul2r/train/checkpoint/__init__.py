"""Checkpoints: content, writing, verification, retention and remote copies."""
