"""From a run script's variables to a training run: read the environment, check everything, start torchrun.

Nothing in this package imports torch or Megatron, but for the mixers where a run sets their options or divides them: a
mistake is reported in well under a second, or in two, before any process, directory or file exists.
"""
