"""What goes through RQ's own code: registration, commands, rare ends of jobs, abandoned jobs.

It may import `claim`, `running` and the ground. Begin with handlers.py.
"""
