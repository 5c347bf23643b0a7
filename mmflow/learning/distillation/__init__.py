"""One file for each distillation loss."""
