"""What travels: requests, results, sampling fields, and the tree of errors.

It may import nothing of the house, and neither redis nor torch. Begin with schemas.py; a sampling
field is added in sampling.py.
"""
