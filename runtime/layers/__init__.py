"""The modules that models are made of: plain PyTorch, with placements and checkpoint names beside it."""
