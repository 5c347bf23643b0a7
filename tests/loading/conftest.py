"""Loading is tested on the small dataset of tests/dataset."""

from tests.dataset.handmade import small_dataset

__all__ = ["small_dataset"]
