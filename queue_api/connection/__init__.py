"""Redis itself: settings, addresses, connections, Sentinel, a server of our own, and what its
errors mean.

It may import `wire`. Begin with connect.py; failures.py is the one place that reads what Redis
says.
"""
