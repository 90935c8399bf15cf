"""Few-shot tasks of lm-evaluation-harness, read as a model was trained to read: modes, and both directions.

prompting.py        settings and texts to rows of tokens
../row_scoring.py   log-probabilities of continuations, batched by length
writing.py          texts that continue a context
harness_model.py    the class that lm-evaluation-harness calls; the only one of these that imports it
"""
