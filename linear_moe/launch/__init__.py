"""From a run script's variables to a training run: read the environment, check everything, start torchrun.

Nothing in this package imports torch or Megatron: a mistake is reported in well under a second, before any process,
directory or file exists.
"""
