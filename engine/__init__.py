"""The partitioned engine: tokens in, tokens out. Knows nothing of Redis.

Letters in shape comments, throughout the package:
B sequences in a batch, T packed tokens of a micro-batch, L tokens in a sequence's cache,
H query heads, Hkv key/value heads, D head size, E hidden size, V vocabulary size, S slots of
the KV pool.
"""
