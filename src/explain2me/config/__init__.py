"""The config file: its tables, how to read it, and how to compare two configs."""
