"""Bulk generation measured against its peers: `python -m benchmarks.throughput`.

__main__    the command line
contest     who takes part, with which settings
models      the random-weight models and their tokenizers, made on demand
workload    what is generated: prompts and output lengths
rounds      the parent: one fresh process per engine and round, interleaved
child       that process: pinned cores, load, warm-up, one timed run
engines/    one thin runner per engine
gemm        the limit: the same matrix products with nothing around them
report      medians, ratios, the table and the picture
"""
