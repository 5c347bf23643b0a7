"""Ray Jobs client and the lint of cluster.yaml."""
