"""Input statistics and per-layer, per-choice quantization errors."""
