"""`tokenrelay bench agent`: coding agents' sessions and published traces, against any OpenAI endpoint."""
