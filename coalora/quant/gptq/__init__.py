"""GPTQ by gptqmodel: the scheme `gptq`."""
