"""The decode role: claims and adopts KV blocks, and turns them into tokens."""
