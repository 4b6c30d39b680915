"""What a measurement is, whatever the op: cases, floors, checks, workers, the store of rows."""
