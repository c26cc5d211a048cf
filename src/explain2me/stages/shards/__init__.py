"""One shard of a run: explain its images and commit its part file. Read ``rows.py`` first."""
