"""NormalFloat with double quantization: the scheme `nf`."""
