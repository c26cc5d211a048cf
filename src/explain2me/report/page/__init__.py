"""The page of a report: a template, its style and its script, and the data for them."""
