"""The `mmflow` command."""
