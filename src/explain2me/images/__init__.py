"""Images: a list of files becomes checked rows and decoded batches."""
