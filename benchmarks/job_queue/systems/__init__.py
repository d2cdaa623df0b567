"""One file per queue system; each imports its library only when it is run.

A system is made with the address of an empty Redis and has three phases, timed apart: `enqueue`
puts all prompts on the queue, `work` runs one worker in this process until they are answered,
`results` has the client read every answer. An answer is the prompt's first word.
"""
