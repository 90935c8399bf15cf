"""Composition of the parts: a worker's run, and Ray Train around it."""
