"""llama.cpp's block types: the scheme `gguf`."""
