"""Who owns which KV: the ledger of handles and the directory of prefixes. A library, no server."""
