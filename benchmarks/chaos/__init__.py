"""Chaos: real workers, clients and a real Redis, killed at seeded random instants."""
