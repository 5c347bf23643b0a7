"""Demonstration corpora."""
