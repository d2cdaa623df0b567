"""A slice of the model on its device, loaded, checked against the whole, and run; and the pipeline
through all slices.

It may import `weights`, `models`, `attention`, `kernels` and the ground. Begin with stage.py,
which runs; loading.py settles how.
"""
