"""What ships with the code: the bundled model and the scripts that made it."""
