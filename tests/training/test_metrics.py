"""What a run writes of itself survives a run that was killed while it wrote."""

import json

from linear_moe.training.metrics import open_metrics


def test_a_line_cut_short_is_left_out_when_the_run_goes_on(tmp_path):
    steps = [{"iteration": i, "seconds": 1.0} for i in range(1, 5)]
    whole = "".join(json.dumps(step) + "\n" for step in steps[:3])
    (tmp_path / "metrics.jsonl").write_text(whole + json.dumps(steps[3])[:10])
    with open_metrics(tmp_path, steps[2]) as file:
        file.write(json.dumps(steps[2]) + "\n")
    kept = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in kept] == steps[:3]
