"""Stage 4: summary tables to a page, figures, tables for a paper, sentences and model cards."""
