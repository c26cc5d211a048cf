"""Salience methods: maps of the image regions that a classifier uses for a class."""
