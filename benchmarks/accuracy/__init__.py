"""What methods make of models: perplexity, tables, plots, ablations."""
