"""Joins the two: a worker process is one engine and one RQ worker."""
