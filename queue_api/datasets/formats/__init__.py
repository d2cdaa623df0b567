"""File formats of rows, a file to each."""
