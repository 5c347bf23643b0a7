"""Batch scoring on Ray Data."""
