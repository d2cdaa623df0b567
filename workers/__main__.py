"""`python -m workers` is `batchmill`."""

from workers.cli import main

main()
