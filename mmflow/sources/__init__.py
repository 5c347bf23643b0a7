"""What a recipe names, as records: one file for each kind of source."""
