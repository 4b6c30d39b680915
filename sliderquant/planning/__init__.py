"""What a run will do, settled and checked before it starts."""
