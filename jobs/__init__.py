"""One thin entry point a stage: what `ray job submit` runs."""
