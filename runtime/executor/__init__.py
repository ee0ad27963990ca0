"""Plan -> Batch -> forward -> sampled tokens."""
