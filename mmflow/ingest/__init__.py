"""Sources to records: where images and captions come from, and what is wrong with them."""
