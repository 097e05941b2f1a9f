"""Training samples in: one file per layout."""
