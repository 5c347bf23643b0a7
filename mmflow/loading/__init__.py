"""Dataset to batches: sample order, reader, transforms, tokenising."""
