"""Scores to tables: means, differences, chance levels and AUROC, with intervals."""
