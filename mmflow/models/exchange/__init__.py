"""Model packages from and to the formats of others."""
