"""Who runs in the next micro-batch, and where in the cache: continuous batching, slots, shared
prefixes, preemption.

It may import `requests` and what is below it. Begin with scheduler.py; what it hands on is a
round.py.
"""
