"""Salience methods: where a classifier looks, for a class, from one forward pass where that is possible."""
