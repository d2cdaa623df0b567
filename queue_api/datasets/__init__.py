"""Files of rows in and out, resumable, each row once.

It may import `client` and what is below it. Begin with run.py; a file format is added in
formats/.
"""
