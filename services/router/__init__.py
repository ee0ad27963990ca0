"""The router: HTTP in, template, tokenize, choose a worker, stream out. No torch, no transformers."""
