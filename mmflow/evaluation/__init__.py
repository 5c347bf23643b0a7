"""Metrics of a model, and the one page that a person reads about a run."""
