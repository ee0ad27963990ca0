"""The model families: what config.json says, read into small frozen dataclasses, and the decoder built from them."""
