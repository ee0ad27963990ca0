"""The kvstore: serves the ledger, the prefix directory and the block tier to the fleet."""
