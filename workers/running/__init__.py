"""What happens between claim and end: the engine's thread, the jobs held, checkpoints, results.

It may import the ground, `engine` and `queue_api`. Begin with runner.py.
"""
