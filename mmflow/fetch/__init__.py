"""URLs to bytes, politely and safely."""
