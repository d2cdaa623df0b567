"""One thin runner per engine, imported only in the process that measures it.

Each module has a class `Runner`, built with `(model, converted, num_threads, **settings)`, whose
`generate(prompts, outputs)` takes token ids and returns greedy token ids; engines that need the
model in their own format have a function `convert(model, target)`. What a runner imports at its top
may be missing: the parent asks first.
"""
