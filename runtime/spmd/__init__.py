"""Programs of the SPMD compiler: planned from a configuration alone, and run by ranks."""
