"""Where jobs come from: claimed when there is room, kept while they run, noticed when cancelled.

It may import `running` and the ground. Begin with intake.py.
"""
