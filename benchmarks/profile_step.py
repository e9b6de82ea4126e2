"""Where the time of a training step goes: run the entry point under torch's profiler, print the largest CUDA kernels.

``python benchmarks/profile_step.py OUTPUT_FILE <arguments of linear_moe.training.pretrain>``; one process.
"""

import sys

import torch
from torch.profiler import ProfilerActivity, profile

from linear_moe.training import metrics, pretrain

FIRST, LAST = 4, 6


def main() -> None:
    output, argv = sys.argv[1], sys.argv[2:]
    profiler = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
    measure = metrics.RunLog._measure

    def measured(self, iteration, *args, **kwargs):
        torch.cuda.synchronize()
        if iteration == FIRST - 1:
            profiler.start()
        if iteration == LAST:
            profiler.stop()
            averages = profiler.key_averages()
            with open(output, "w") as file:
                file.write(
                    averages.table(sort_by="self_cuda_time_total", row_limit=40, max_name_column_width=70)
                )
                file.write(
                    averages.table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=70)
                )
        return measure(self, iteration, *args, **kwargs)

    metrics.RunLog._measure = measured
    pretrain.main(argv)


if __name__ == "__main__":
    main()
