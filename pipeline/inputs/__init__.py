"""Inputs of stages: data files, and the models and tables behind artifacts."""
