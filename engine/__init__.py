"""The partitioned engine: tokens in, tokens out. Knows nothing of Redis.

The wings, top to bottom: engine.py and loading.py, `planning`, `stages`, `scheduling`, `requests`,
`sampling`, `weights`, `models`, `attention`, `kernels`, and the ground (config.py, plan.py,
batch.py, transfer.py, metrics.py); each imports only from those below it and from
`queue_api.wire`. Begin with engine.py.

Letters in shape comments, throughout the package:
B sequences in a batch, T packed tokens of a micro-batch, L tokens in a sequence's cache,
H query heads, Hkv key/value heads, D head size, E hidden size, V vocabulary size, S slots of
the KV pool.
"""
