"""Records to samples, or to a reason why not."""
