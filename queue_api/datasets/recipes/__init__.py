"""Recipes: several stages over one input, each asked after the answers to the ones before it."""
