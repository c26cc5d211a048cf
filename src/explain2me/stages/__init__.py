"""The stages of a run: check, index, explain, measure, summarise, verify, compact."""
