"""Benchmarks: a data set, its splits and its metric."""
