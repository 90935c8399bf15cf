"""Conversion of Hugging Face models: read into each rank's shards, written from a distributed checkpoint.

`families.py` holds a table per family; no other module knows one by name.
"""
