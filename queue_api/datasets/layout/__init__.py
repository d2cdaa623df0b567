"""Where the prompt is: what the columns of a row mean, and which of them come back.

Begin with layout.py, the options; `LayoutReader` does what they say.
"""
