"""The synthetic study: every method on a task whose law is known, at equal updates and network evaluations, over seeds.

    python benchmarks/synthetic_study.py --out runs/study [--task synthetic://all_equal?vocab_size=32] [--length 8]

For each seed a teacher is trained, then every method's student from it by the shipped recipes. What is there already
is not trained again, so an interrupted study goes on. Prints a markdown table and writes it with study.json to --out;
each number is a mean over the seeds with Student's 95% interval.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import stats

from imdm_scale.data.synthetic import AllEqual, SyntheticTask
from imdm_scale.data.synthetic_source import synthetic_source
from imdm_scale.evaluate.synthetic import mean_log_prob, pair_distance, possible_share, token_entropy
from imdm_scale.hf.export import load_folder

ROOT = Path(__file__).resolve().parents[1]
STEPS = (1, 2, 4, 8, 16)
TRAJECTORY_STEPS = 16
COUPLED_BATCH = 120
EVALUATIONS = (TRAJECTORY_STEPS + 1) * COUPLED_BATCH
"""Of student and teacher together in an update of every method (for im_redi the pairs' are spread over its updates)."""
REDI_BATCH = EVALUATIONS // 2
ROUNDS = 5
"""Of teachers with 32, 16, 8, 4 and 2 steps."""


@dataclass(frozen=True)
class Student:
    """How one student is trained."""

    recipe: str
    words: tuple[str, ...] = ()
    """`key=value`; `{teacher}`, `{pairs}` and `{updates}` stand for what they say."""
    batch: int = COUPLED_BATCH
    sampled_as: str | None = None
    """Another sampler than the one it was trained for."""
    same_as: str | None = None
    """The student of this name, sampled in another way."""


PLAIN = ("model.noise_dim=0", "model.noise_fourier=0")
FROM_TEACHER = "teacher.path={teacher}"
STUDENTS = {
    "mdm_sdtt": Student("synthetic_im_sdtt", (FROM_TEACHER, *PLAIN), EVALUATIONS // 3),
    "im_sdtt": Student("synthetic_im_sdtt", (FROM_TEACHER,), EVALUATIONS // 3),
    "finite_sdtt": Student(
        "synthetic_im_sdtt",
        (FROM_TEACHER, "model.noise_dim=null", "model.noise_fourier=0", "model.num_masks=32"),
        EVALUATIONS // 3,
    ),
    "mdm_redi": Student("synthetic_im_redi", PLAIN, REDI_BATCH),
    "im_redi": Student("synthetic_im_redi", (), REDI_BATCH),
    "coupled": Student("synthetic_coupled", (FROM_TEACHER,)),
    "coupled_cdf": Student("synthetic_coupled", sampled_as="coupled", same_as="coupled"),
    "coupled_late": Student("synthetic_coupled", (FROM_TEACHER, "method.sampling_eps=0.5")),
    "coupled_on_policy": Student(
        "synthetic_coupled",
        (FROM_TEACHER, "method.states=mix", "method.visit_steps=1", "method.trajectory_steps=15"),
    ),
    "progressive": Student(
        "synthetic_coupled",
        (FROM_TEACHER, "method.target=progressive", "method.initial_steps=32"),
        EVALUATIONS // 3,
    ),
    "mixture": Student(
        "synthetic_coupled",
        (FROM_TEACHER, "method.target=mixture", "method.initial_steps=32", "method.trajectory_steps=14"),
    ),
}


class Study:
    """One task's trainings and what they came to."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.task: SyntheticTask = synthetic_source(arguments.task, arguments.length).task

    def run(self) -> None:
        """Trains, samples and writes."""
        out: Path = self.arguments.out
        rows: dict[str, list[dict[str, object]]] = {}
        for seed in self.arguments.seeds:
            teacher = self.train(seed, "teacher", "synthetic_teacher", [])
            rows.setdefault("teacher", []).append(self.measured(seed, "teacher", None))
            for name in self.arguments.students:
                student = STUDENTS[name]
                if student.same_as is None:
                    self.train_student(seed, name, student, teacher)
                rows.setdefault(name, []).append(
                    self.measured(seed, student.same_as or name, student.sampled_as)
                )
                table = self.table(rows)
                (out / "study.json").write_text(
                    json.dumps({"rows": rows, "settings": self.settings()}, indent=1)
                )
                (out / "study.md").write_text(table)
        print(self.table(rows))

    def settings(self) -> dict[str, object]:
        """What the study was asked for."""
        return {name: str(value) for name, value in vars(self.arguments).items()}

    def train_student(self, seed: int, name: str, student: Student, teacher: Path) -> None:
        """One student, and before it the pairs that it learns from."""
        updates = self.arguments.updates
        words = [f"train.global_batch_size={student.batch}", f"train.micro_batch_size={student.batch}"]
        words += [f"train.max_steps={updates}"]
        if "im_redi" in student.recipe:
            pairs = self.arguments.out / f"pairs-{seed}"
            num_pairs = updates * (EVALUATIONS - student.batch) // TRAJECTORY_STEPS
            if not (pairs / "manifest.json").exists():
                flags = ["--model", str(teacher), "--data", self.arguments.task, "--out", str(pairs)]
                flags += [
                    "--num-pairs",
                    str(num_pairs),
                    "--steps",
                    str(TRAJECTORY_STEPS),
                    "--seed",
                    str(seed),
                ]
                self.call(self.arguments.out / f"pairs-{seed}.log", "tools/generate_pairs.py", *flags)
            words += [f"data.path={pairs}", f"train.init_from={teacher}"]
        else:
            words += [f"method.steps_per_round={-(-updates // ROUNDS)}"]
        words += [word.format(teacher=teacher) for word in student.words]
        self.train(seed, name, student.recipe, words)

    def train(self, seed: int, name: str, recipe: str, words: list[str]) -> Path:
        """Trains unless it was done; returns the exported model's folder."""
        run_dir = self.arguments.out / f"{name}-{seed}"
        if not (run_dir / "student" / "config.json").exists():
            flags = ["--ds_config", "configs/ds/zero1.json", "--recipe", f"configs/recipes/{recipe}.yaml"]
            common = [f"run_dir={run_dir}", f"seed={seed}", "evaluate.at_end=false"]
            common += [f"model.length={self.arguments.length}"]
            if recipe != "synthetic_im_redi":
                common += [f"data.path={self.arguments.task}"]
            self.call(run_dir.with_suffix(".log"), "tools/train.py", *flags, *common, *words)
        return run_dir / "student"

    def call(self, log: Path, *words: str) -> None:
        """Runs a tool; its output goes to a file."""
        with open(log, "w") as file:
            subprocess.run(
                [sys.executable, *words], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=True
            )

    def measured(self, seed: int, name: str, sampler: str | None) -> dict[str, object]:
        """What a model writes, and what its training cost."""
        run_dir = self.arguments.out / f"{name}-{seed}"
        updates = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        use = [
            u["diagnostics"]["noise_information"]
            for u in updates
            if "noise_information" in (u["diagnostics"] or {})
        ]
        row: dict[str, object] = {
            "seed": seed,
            "updates": updates[-1]["step"],
            "evaluations": updates[-1]["network_evaluations"],
            "noise_information": use[-1] if use else None,
        }
        if "redi" in name:
            row["evaluations"] = updates[-1]["step"] * EVALUATIONS
        model = load_folder(run_dir / "student").float()
        for num_steps in STEPS:
            ids_SL = model.generate_text(
                self.arguments.num_samples, num_steps, seed=1000 + seed, sampler=sampler
            )
            samples = ids_SL.numpy()
            row[f"rate_{num_steps}"] = possible_share(samples, self.task).value
            row[f"entropy_{num_steps}"] = token_entropy(samples, self.task.vocab_size)
            row[f"pairs_{num_steps}"] = pair_distance(samples, self.task)
            row[f"log_prob_{num_steps}"] = mean_log_prob(samples, self.task)
        return row

    def table(self, rows: dict[str, list[dict[str, object]]]) -> str:
        """Markdown: what could be written at all, or how likely it is, by steps; then the rest at one step."""
        own = self.task.samples(0, 1 << 40, self.arguments.num_samples)
        main = "rate" if isinstance(self.task, AllEqual) else "log_prob"
        what = {"rate": "share of possible samples", "log_prob": "mean ln p of a sample (nats)"}[main]
        lines = [f"{what} at 1, 2, 4, 8, 16 steps; the rest at one step\n"]
        heads = [
            "",
            "updates",
            "evaluations",
            "I(token; e)",
            *(f"{n}" for n in STEPS),
            "entropy / max",
            "pair distance",
        ]
        lines += ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
        maximum = np.log(self.task.vocab_size)
        for name, found in rows.items():
            cells = [name, f"{found[0]['updates']:,}", f"{found[0]['evaluations']:,}"]
            cells += [interval([row["noise_information"] for row in found])]
            cells += [interval([row[f"{main}_{n}"] for row in found]) for n in STEPS]
            cells += [f"{np.mean([row['entropy_1'] for row in found]) / maximum:.3f}"]
            cells += [f"{np.mean([row['pairs_1'] for row in found]):.3f}"]
            lines.append("| " + " | ".join(cells) + " |")
        share = possible_share(own, self.task).value if main == "rate" else mean_log_prob(own, self.task)
        entropy = token_entropy(own, self.task.vocab_size) / maximum
        cells = ["the law itself", "", "", "", *[f"{share:.3f}"] * len(STEPS), f"{entropy:.3f}"]
        lines.append("| " + " | ".join([*cells, f"{pair_distance(own, self.task):.3f}"]) + " |")
        return "\n".join(lines) + "\n"


def interval(values: list[object]) -> str:
    """Mean over the seeds, with half the width of Student's 95% interval."""
    numbers = np.array([value for value in values if value is not None], dtype=np.float64)
    if len(numbers) == 0:
        return ""
    if len(numbers) == 1:
        return f"{numbers[0]:.3f}"
    half = stats.t.ppf(0.975, len(numbers) - 1) * numbers.std(ddof=1) / np.sqrt(len(numbers))
    return f"{numbers.mean():.3f} ± {half:.3f}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the study")
    parser.add_argument("--task", default="synthetic://all_equal?vocab_size=32", help="as in data.path")
    parser.add_argument("--length", type=int, default=8, help="ids in a sequence (default: 8)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="(default: 1 2 3)")
    parser.add_argument("--updates", type=int, default=1500, help="of every student (default: 1,500)")
    parser.add_argument(
        "--students", nargs="+", choices=STUDENTS, default=list(STUDENTS), help="(default: all)"
    )
    parser.add_argument(
        "--num-samples", type=int, default=10_000, help="for each number of steps (default: 10,000)"
    )
    arguments = parser.parse_args()
    arguments.out = arguments.out.resolve()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    Study(arguments).run()


if __name__ == "__main__":
    main()
