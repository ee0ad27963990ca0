"""TokenRelay."""
