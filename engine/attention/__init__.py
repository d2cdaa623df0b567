"""How packed tokens attend over what is cached, whatever the model.

It may import `kernels` and the ground. Begin with hook.py, which transformers calls; backend.py
says what a way to attend has to do, and a new one is a file here and a line in choice.py.
"""
