"""How the weights of linear modules are kept and laid out for products.

It may import `models`, `kernels` and the ground. Begin with format.py, the seam for a new weight
format.
"""
