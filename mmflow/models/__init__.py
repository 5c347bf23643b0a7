"""Encoders, the composed models, model packages."""
