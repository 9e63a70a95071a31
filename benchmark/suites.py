"""Suites of runs from suites.toml, as commands, and as grid sweeps for W&B agents."""

import fnmatch
import json
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import yaml

from utils import UserError, parse_task

HERE = Path(__file__).resolve().parent
SUITES = tomllib.loads((HERE / "suites.toml").read_text())
TASKS, FLAGS = SUITES.pop("tasks"), SUITES.pop("flags")
SUITES["smoke"]["rows"] = [
    row | {"tasks": task, "seeds": [0], "flags": f"{flags} {row.get('flags', '')}"}
    for row in SUITES["paper"]["rows"]
    for task, flags in [SUITES["smoke"]["scripts"][row["script"]]]
]
SWEPT = ("romi_bcq", "romi_cql", "mopo", "combo", "armor", "sra_iql")  # the headline algorithms


@dataclass(frozen=True)
class Run:
    """A command and its run folder."""

    folder: Path
    command: tuple[str, ...]
    updates: int  # 0: the script's default
    lender: str  # name of the run whose model it uses, or ""

    @property
    def name(self):
        return self.folder.name

    def finished(self):
        """Also true if it went beyond the suite's updates."""
        result = self.folder / "result.json"
        return result.exists() and json.loads(result.read_text())["updates"] >= self.updates


def tasks_of(row):
    return [task for word in row["tasks"].split() for task in TASKS[word]]


def source_of(dataset):
    """The end of a run's name for this data."""
    if dataset.endswith((".hdf5", ".h5")):
        return f"__{Path(dataset).stem}"
    return {"d4rl": "", "bundled": "__bundled", "generated": "__generated"}.get(dataset, "__minari")


def expand(suite, only=(), run_dir=""):
    """Runs of the suite whose names contain or match one of `only`, and first the runs whose models they use."""
    suite, runs = SUITES[suite], {}
    run_dir = run_dir or suite["run_dir"]
    words = FLAGS | {"run_dir": "{run_dir}"}  # filled in after the split, as it may contain spaces
    for row in suite["rows"]:
        for task, seed in ((task, seed) for task in tasks_of(row) for seed in row.get("seeds", (0, 1, 2))):
            data = suite["data"].get(task, "d4rl")
            begin, end = parse_task(task).slug, f"{seed}{source_of(data)}"
            lender = f"{begin}__{row['model_of']}__{end}" if "model_of" in row else ""
            text = f"--env {task} --dataset {data} --seed {seed} --exp-name {row['name']} --run-dir {{run_dir}}"
            text += f" {suite['flags']} {row.get('flags', '')}"
            text += f" --dynamics-from {{run_dir}}/{lender}/dynamics.pt" if lender else ""
            flags = [word.format(run_dir=run_dir) for word in text.format(**words).split()]
            updates = int(flags[flags.index("--total-updates") + 1]) if "--total-updates" in flags else 0
            command = (sys.executable, f"algorithms/{row['script']}.py", *flags)
            run = Run(Path(run_dir) / f"{begin}__{row['name']}__{end}", command, updates, lender)
            runs[run.name] = run
    wanted = {n for n in runs if not only or any(w in n or fnmatch.fnmatchcase(n, w) for w in only)}
    if not wanted:
        raise UserError(f"--only {' '.join(only)}: no run of this suite matches; --dry-run lists them all")
    wanted |= {runs[n].lender for n in wanted}
    return sorted((run for n, run in runs.items() if n in wanted), key=lambda run: bool(run.lender))


def sweep_files():
    """Path -> text of a grid sweep, env x seed, for the headline algorithm of each paper."""
    files = {}
    for row in (row for row in SUITES["paper"]["rows"] if row["name"] in SWEPT):
        tasks = [task for task in tasks_of(row) if task not in TASKS["jumps"]]  # no official file
        sweep = dict(program=f"algorithms/{row['script']}.py", name=row["name"], project="rewind", method="grid")
        sweep["metric"] = {"name": "eval/normalized_score", "goal": "maximize"}
        sweep["parameters"] = {"env": {"values": tasks}, "seed": {"values": row.get("seeds", [0, 1, 2])}}
        sweep["command"] = ["${env}", "${interpreter}", "${program}", "--track", "--dataset", "d4rl", "${args}"]
        file = HERE / "sweeps" / f"{row['name']}.yaml"
        how = f"wandb sweep benchmark/sweeps/{file.name}, then wandb agent <id>"
        files[file] = f"# Made by `python -m benchmark sweeps`. {how}\n" + yaml.safe_dump(sweep, sort_keys=False)
    return files
