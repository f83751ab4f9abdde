"""Base models: loading, target layers, weight switching, GGUF as input."""
