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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from imdm_scale.data.synthetic import SyntheticTask
from imdm_scale.data.synthetic_source import synthetic_source
from imdm_scale.diffusion.coupling import coordinates, trajectory
from imdm_scale.diffusion.noise import mask_noise
from imdm_scale.diffusion.sampler import draw_tokens
from imdm_scale.evaluate.synthetic import likely_share, pair_distance, token_entropy
from imdm_scale.hf.export import load_folder
from imdm_scale.hf.modeling_imdm import ImdmForMaskedLM

ROOT = Path(__file__).resolve().parents[1]
STEPS = (1, 2, 4, 8, 16)
COUPLED_BATCH = 120
SMALL_STEPS = 16
"""Of the teacher for pairs, and of the coupled trajectory on the grid of time."""
ROUNDS = 5
"""Of teachers with 32, 16, 8, 4 and 2 steps."""


@dataclass(frozen=True)
class Student:
    """How one student is trained."""

    recipe: str
    words: tuple[str, ...] = ()
    evaluations: Callable[[int], int] = lambda length: length + 1
    """Of the networks for each sample of an update, given the task's length: the coupled student's labels take a step
    for each position. Batches are larger where they are fewer, so that every student has the same number in all."""
    same_as: str | None = None
    """The student of this name, but drawing its tokens by the noise's u instead of taking the likeliest."""


PLAIN = ("model.noise_dim=0", "model.noise_fourier=0")
TIME = ("method.trajectory_grid=time", f"method.trajectory_steps={SMALL_STEPS}")
STUDENTS = {
    "mdm_sdtt": Student("synthetic_im_sdtt", PLAIN, lambda length: 3),
    "im_sdtt": Student("synthetic_im_sdtt", (), lambda length: 3),
    "finite_sdtt": Student(
        "synthetic_im_sdtt",
        ("model.noise_dim=null", "model.noise_fourier=0", "model.num_masks=32"),
        lambda length: 3,
    ),
    "mdm_redi": Student("synthetic_im_redi", PLAIN, lambda length: 2),
    "im_redi": Student("synthetic_im_redi", (), lambda length: 2),
    "coupled": Student("synthetic_coupled"),
    "coupled_cdf": Student("synthetic_coupled", same_as="coupled"),
    "coupled_order": Student("synthetic_coupled", ("method.trajectory_grid=order",)),
    "coupled_time": Student("synthetic_coupled", TIME, lambda length: SMALL_STEPS + 1),
    "coupled_raw": Student("synthetic_coupled", ("model.noise_fourier=0",)),
    "progressive": Student(
        "synthetic_coupled", ("method.target=progressive", "method.initial_steps=32"), lambda length: 3
    ),
    "progressive_on_policy": Student(
        "synthetic_coupled",
        (
            "method.target=progressive",
            "method.initial_steps=32",
            "method.states=student",
            "method.visit_steps=2",
        ),
        lambda length: 5,
    ),
    "mixture": Student(
        "synthetic_coupled", ("method.target=mixture", "method.initial_steps=32"), lambda length: length + 3
    ),
}
"""A pair counts for im_redi as one evaluation of the student and one of the teacher's, of which it takes SMALL_STEPS:
there is one pair for so many samples."""


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
                sampler = "coupled" if student.same_as else None
                rows.setdefault(name, []).append(self.measured(seed, student.same_as or name, sampler))
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
        updates, in_an_update = self.arguments.updates, (self.task.length + 1) * COUPLED_BATCH
        batch = in_an_update // student.evaluations(self.task.length)
        words = [f"train.global_batch_size={batch}", f"train.micro_batch_size={batch}"]
        words += [f"train.max_steps={updates}"]
        if student.recipe == "synthetic_im_redi":
            pairs = self.arguments.out / f"pairs-{seed}"
            if not (pairs / "manifest.json").exists():
                num_pairs = updates * batch // SMALL_STEPS
                flags = ["--model", str(teacher), "--data", self.arguments.task, "--out", str(pairs)]
                flags += ["--num-pairs", str(num_pairs), "--steps", str(SMALL_STEPS), "--seed", str(seed)]
                flags += ["--batch-size", "512", "--shard-pairs", "16384"]
                self.call(pairs.with_suffix(".log"), "tools/generate_pairs.py", *flags)
            words += [f"data.path={pairs}", f"train.init_from={teacher}"]
        else:
            words += [f"method.steps_per_round={-(-updates // ROUNDS)}", f"teacher.path={teacher}"]
        if student.recipe == "synthetic_coupled":
            words += [f"method.trajectory_steps={self.task.length}", "method.trajectory_grid=position"]
        self.train(seed, name, student.recipe, [*words, *student.words])

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
            if "noise_information" in (u.get("diagnostics") or {})
        ]
        row: dict[str, object] = {
            "seed": seed,
            "updates": updates[-1]["step"],
            "evaluations": updates[-1]["network_evaluations"],
            "noise_information": use[-1] if use else None,
        }
        if "redi" in name:  # as many again for the pairs
            row["evaluations"] = 2 * updates[-1]["network_evaluations"]
        model = load_folder(run_dir / "student").float()
        for num_steps in STEPS:
            ids_SL = model.generate_text(
                self.arguments.num_samples, num_steps, seed=1000 + seed, sampler=sampler
            )
            samples = ids_SL.numpy()
            row[f"rate_{num_steps}"] = likely_share(samples, self.task).value
            row[f"entropy_{num_steps}"] = token_entropy(samples, self.task.vocab_size)
            row[f"pairs_{num_steps}"] = pair_distance(samples, self.task)
        if name == "teacher":
            one_by_one = self.one_by_one(model, seed)
            row["rate_one_by_one"] = likely_share(one_by_one, self.task).value
        return row

    def one_by_one(self, model: ImdmForMaskedLM, seed: int) -> np.ndarray:
        """What the teacher writes one position after the other: the trajectory of the coupled student's labels."""
        count, length, mask_id = self.arguments.num_samples, self.task.length, model.config.mask_token_id
        noise = coordinates(mask_noise(1000 + seed, torch.arange(count), 0, length, 2))

        @torch.no_grad()
        def tokens(x_BL: Tensor, positions_N: Tensor, u_N: Tensor) -> Tensor:
            return draw_tokens(model(x_BL).logits.flatten(0, 1)[positions_N], u_N, mask_id=mask_id)

        start_BL, t_B = torch.full((count, length), mask_id), torch.ones(count, dtype=torch.float64)
        return trajectory(tokens, start_BL, noise, t_B, length, mask_id=mask_id, grid="position").numpy()

    def table(self, rows: dict[str, list[dict[str, object]]]) -> str:
        """Markdown: what could be written at all, or how likely it is, by steps; then the rest at one step."""
        own = self.task.samples(0, 1 << 40, self.arguments.num_samples)
        lines = ["share of likely samples at 1, 2, 4, 8, 16 steps; the rest at one step\n"]
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
            cells += [interval([row[f"rate_{n}"] for row in found]) for n in STEPS]
            cells += [f"{np.mean([row['entropy_1'] for row in found]) / maximum:.3f}"]
            cells += [f"{np.mean([row['pairs_1'] for row in found]):.3f}"]
            lines.append("| " + " | ".join(cells) + " |")
        one_by_one = interval([row["rate_one_by_one"] for row in rows["teacher"]])
        lines[0] += f"the teacher one position after the other: {one_by_one}\n"
        share = likely_share(own, self.task).value
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
