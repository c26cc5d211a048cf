"""The config file: its fields, how it is read, and what differs between two of them."""
