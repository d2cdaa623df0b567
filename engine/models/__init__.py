"""Hugging Face's side: checkpoints, configs, tokenizers, and a model cut to some of its layers.

It may import `attention`, `kernels` and the ground. Begin with checkpoint.py, which finds the
files, and slicing.py, which makes the slice. All knowledge of transformers' internals stands here
and in `stages`.
"""
