"""Text, tokens, and the activations that they lead to."""
