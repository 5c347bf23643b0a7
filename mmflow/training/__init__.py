"""DeepSpeed engine, loop, checkpoints, telemetry; the Ray Train adapter is one file."""
