"""Methods of other packages, each by an interpreter of its own."""
