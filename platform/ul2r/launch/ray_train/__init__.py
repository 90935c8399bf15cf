"""Runs under Ray Train."""
