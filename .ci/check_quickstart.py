"""Did the quickstart do what the README says? Fails with the first thing that it did not."""

import json
import sys
from pathlib import Path

run_dir = Path(sys.argv[1])
quality = json.loads((run_dir / "quality.json").read_text())
updates = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
teacher, student = quality["teacher"]["4"], quality["student"]["4"]
print(f"4 steps: teacher {teacher}, student {student}; {len(updates)} updates in {updates[-1]['seconds']} s")
assert student["perplexity"] < teacher["perplexity"], "the student beats its teacher at 4 steps"
assert student["entropy"] > 0.95 * teacher["entropy"], "and does not pay for it with entropy"
assert all({"step", "loss", "grad_norm", "tokens", "seconds"} <= update.keys() for update in updates)
for name in ("quality.png", "student/model.safetensors", "student/config.json", "student/tokenizer.model"):
    assert (run_dir / name).stat().st_size > 0, name
