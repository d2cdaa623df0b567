"""Which layers go on which device: sizes, costs, measured speeds, free memory, and the cut.

It may import every wing below, for it loads and measures stages. Begin with partition.py, which
cuts by given costs; costs.py says what they are.
"""
