"""Artifacts, storage URIs, typed errors, the base of settings, progress: nothing about images or models."""
