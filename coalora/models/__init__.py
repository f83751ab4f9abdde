"""Base models: loading, target layers, weight switching, pre-training of the embedded demo model."""
