"""A model package over a dataset, shard by shard."""
