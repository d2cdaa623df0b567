"""`batchmill run`: a file to a file on this machine, with workers and a Redis of its own.

It may import `workers`, `engine` and `queue_api`. Begin with offline.py.
"""
