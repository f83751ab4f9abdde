"""Configuration-aware LoRA for quantized models (CoA-LoRA, arXiv 2509.25214): the method, without the pipeline."""
