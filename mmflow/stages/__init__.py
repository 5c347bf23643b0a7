"""The loop: its stages and their order."""
