"""Pareto search over quantization configurations: allocation, surrogate, acquisition, proposals."""
