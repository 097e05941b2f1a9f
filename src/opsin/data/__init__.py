"""Samples in: one file per layout."""
