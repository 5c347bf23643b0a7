"""The format on disk, and how a dataset is built, grown, adopted, verified and read."""
