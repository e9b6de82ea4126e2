"""Run what Triton compiles for a GPU on a CPU: its PTX, thread by thread, with checks that no GPU makes."""
