"""The command line: a file to each command, and the options that they share.

It may import `offline`, `workers`, `engine` and `queue_api`. Begin with app.py; a new command is
a file here and a name there.
"""
