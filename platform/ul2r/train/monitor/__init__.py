"""Watches a run: anomalies, hangs, throughput, system load, profiles."""
