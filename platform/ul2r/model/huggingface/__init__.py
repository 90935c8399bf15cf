"""Models in Hugging Face form: read into each rank's shard, written from a distributed checkpoint.

`families.py` holds a table for each family; the rest knows none of them by name.
"""
