"""What the 4-bit caches cost in quality: every cache on the example model and its planted variants."""
