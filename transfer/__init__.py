"""Moves KV blocks between processes: what memory there is, who may read it, and the transports. Moves bytes, no torch.

pool = SharedPool(layout.block_bytes, blocks)                # memory that another process can be given
transport = open_transport("shared", identity, pool.memory(layout), listen="unix:/run/kv.sock")
await transport.open()
...                                                          # transport.endpoint() travels to the peer
connection = await transport.connect(endpoint, deadline)
await connection.pull([Span(0, layers, theirs, ours)], deadline)
await connection.validate(theirs, generations, deadline)     # after the data, always (law 4)

docs/transfer.md says what each transport promises.
"""
