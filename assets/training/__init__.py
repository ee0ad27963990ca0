"""How the bundled model was made: a toy world that writes transcripts, a tokenizer, a trainer, an export, an exam."""
