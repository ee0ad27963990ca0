"""The prefill role: prompt -> KV blocks and the first token, offered in the ledger."""
