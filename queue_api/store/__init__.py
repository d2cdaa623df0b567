"""Runs and jobs as they stand in Redis: keys, scripts, jobs as RQ has them, what to do when some
are lost.

It may import `connection` and `wire`. Begin with run_store.py; keys.py names every key.
"""
