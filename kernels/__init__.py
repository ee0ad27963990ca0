"""Operations of a language model, each with a plain PyTorch reference and kernels chosen by what the machine has.

`ops` holds the public functions, `registry` chooses among implementations and explains the choice, `layout` describes
the paged KV caches, `batch` the arguments that all layers of a step share. Importing this package imports no torch.
"""
