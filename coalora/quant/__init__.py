"""Quantization schemes: what a layer's weight may become, how many bytes that takes, and how it is done."""
