"""Records to dataset: tar codec, index, manifest, the Ray Data build, verify."""
