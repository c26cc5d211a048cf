"""Detectors: an architecture, its weights, and how it reads images."""
