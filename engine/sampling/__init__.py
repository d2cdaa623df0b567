"""Logits to tokens: what a request changes, draws, log-probabilities, grammars. Arrays in, arrays
out; it knows no sequence.

It may import `models` (for the tokenizer) and the ground. Begin with sampler.py; a new sampling
field that changes logits goes into logits.py.
"""
