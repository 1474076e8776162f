"""How reinforcement learning changes the weights of language models, on one machine.

Everything that needs one process, one trial or two checkpoints lives here; ``pipelines`` spreads
the same functions over a cluster. Importing this package imports none of its modules.
"""
