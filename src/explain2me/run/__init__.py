"""A run folder: its files, the plan of its shards, and what made it."""
