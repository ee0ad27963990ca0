"""Hugging Face checkpoint folders: read as they are, memory-mapped, checked before anything is allocated."""
