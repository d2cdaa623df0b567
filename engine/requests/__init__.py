"""A request while the engine has it: its tokens, its samples, how it ends and what comes of it.

It may import `sampling`, `models` and the ground. Begin with sequence.py, then endings.py.
"""
