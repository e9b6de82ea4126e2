"""What a run says of itself: its line, and a file that survives a run that was killed while it wrote."""

import json

from linear_moe.training.metrics import open_metrics, progress_line


def test_a_line_cut_short_is_left_out_when_the_run_goes_on(tmp_path):
    steps = [{"iteration": i, "seconds": 1.0} for i in range(1, 5)]
    whole = "".join(json.dumps(step) + "\n" for step in steps[:3])
    (tmp_path / "metrics.jsonl").write_text(whole + json.dumps(steps[3])[:10])
    with open_metrics(tmp_path, steps[2]) as file:
        file.write(json.dumps(steps[2]) + "\n")
    kept = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in kept] == steps[:3]


def test_days_are_hours():
    step = {"iteration": 10, "seconds": 3.0, "grad_norm": None, "learning_rate": 1e-4, "peak_memory_gib": 1.0}
    step |= {"tokens_per_second_per_gpu": 1e3, "tflops_per_gpu": 1.0, "mfu": None}
    assert progress_line(step, 70_017, 1).endswith("  eta 58h20m21s")
    assert progress_line(step, 10, 1).endswith("  eta 00h00m00s")
