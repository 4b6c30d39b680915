"""What a plan leaves open until it is measured: bits, the seed of rotations."""
