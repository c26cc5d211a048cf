"""Detectors: an architecture, its weights and its preprocessing."""
