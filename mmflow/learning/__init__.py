"""What is learned: objectives and distillation losses."""
