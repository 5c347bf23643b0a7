"""mmflow: image–text corpora in, better multimodal models out, every night, on the Ray cluster you already have."""

__version__ = "0.1.0"
