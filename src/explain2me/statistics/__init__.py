"""From scores to numbers with intervals: means, differences, chance levels, AUROC."""
