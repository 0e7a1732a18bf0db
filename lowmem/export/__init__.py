"""Models of lowmem as directories of Hugging Face transformers, and back."""
