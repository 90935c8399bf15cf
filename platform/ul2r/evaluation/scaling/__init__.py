"""Scores over training compute: points of a ladder, what an arm saves, where a task emerges."""
