"""MLflow tracking, versions and aliases, the promotion gate."""
