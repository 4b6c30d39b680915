"""What the ops with rounded activations share: inputs, rows, schemes, rotations."""
