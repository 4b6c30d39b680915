"""What a model is measured by: perplexity, sensitivity, speed and memory."""
