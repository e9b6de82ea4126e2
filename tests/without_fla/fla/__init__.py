"""In the place of flash-linear-attention for programs that tests start: what users run does without it.

Where it is installed Megatron imports it, which takes half of a program's start.
"""

raise ImportError("hidden from the programs that tests start (tests/without_fla)")
