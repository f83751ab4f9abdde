"""The configuration-aware adapter: theta, LoRA layers and the model that joins them."""
