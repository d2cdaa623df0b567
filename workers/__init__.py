"""One worker process: an engine and, to RQ, one more RQ worker.

The wings, top to bottom: the process itself (worker.py, service.py, maintenance.py), `rq_side`,
`claim`, `running`, and the ground (leases.py, patience.py, settings.py, `scripts`); each imports
only from those below it, from `engine` and from `queue_api`. Begin with worker.py.
"""
