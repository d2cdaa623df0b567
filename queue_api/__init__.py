"""What producers import: wire models, client, datasets. Needs no torch."""
