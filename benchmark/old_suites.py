"""What `benchmark.py run` runs: suites, which are tables of runs, and how they become plain commands.

A row of a suite is an algorithm (its name is the run's --exp-name, and the name in tables), a script, tasks and flags; it makes
a run per task and seed. `model_of` names the row whose run of the same task and seed lends its dynamics model (--dynamics-from):
the same bits as training it again, in no time. To add an algorithm, add a line; a script that does not exist is passed over.
"""

import contextlib
import fnmatch
import functools
import importlib
import io
import json
import os
import re
import shlex
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import tyro

import utils
from utils import UserError, parse_task

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "algorithms"))


@dataclass(frozen=True)
class Row:
    name: str
    script: str
    tasks: tuple[str, ...]
    flags: str = ""
    model_of: str | None = None
    seeds: tuple[int, ...] = ()  # (): the suite's


@dataclass(frozen=True)
class Suite:
    rows: list[Row]
    flags: str = ""  # of every run
    seeds: tuple[int, ...] = (0, 1, 2)
    data: dict[str, str] = field(default_factory=dict)  # task -> --dataset; d4rl where nothing is said
    prepare: dict[str, str] = field(default_factory=dict)  # file -> flags of datasets/maze2d.py, which makes it
    run_dir: str = "runs"


HOPPER, MAZE = ("hopper-medium-replay",), ("maze2d-umaze",)

# Sizes at which every phase of every script takes seconds. Their scores mean nothing.
TINY = "--total-updates 40 --eval-every 20 --eval-episodes 2 --log-every 10 --checkpoint-every 20 --num-threads 1"
TINY += " --batch-size 20 --hidden 16 16 --dynamics-hidden 16"
ONCE = "--dynamics-max-epochs 2 --model-buffer-size 5000 --rollout-batch-size 500 --rollout-policy-updates 40 --vae-hidden 16"
AGAIN = "--dynamics-max-epochs 2 --rollout-every 10 --rollout-starts 200 --rollouts-kept 2"
CQL, BCQ = "--bc-warmup 20 --cql-samples 2", "--bcq-samples 2 --eval-samples 4"
GAME = "--dynamics-max-epochs 2 --warm-start-updates 20 --model-buffer-size 5000"
SRA = "--dynamics-max-epochs 1 --model-buffer-size 4000 --rollout-every 20 --rollout-policy cvae --rollout-policy-updates 40"
SRA += " --vae-hidden 16 --expert-dataset {run_dir}/data/maze2d_umaze_expert.hdf5"
LEARNERS, WITH_AND_WITHOUT = ("td3bc", "awac", "sacn"), (("uds", " --model-ratio 0"), ("sra", ""))

SMOKE = Suite(
    flags=TINY,
    seeds=(0,),
    data={"hopper-medium-replay": "bundled", "maze2d-umaze": "{run_dir}/data/maze2d_umaze.hdf5"},
    prepare={
        "{run_dir}/data/maze2d_umaze.hdf5": "--steps 20000 --out {run_dir}/data",
        "{run_dir}/data/maze2d_umaze_expert.hdf5": "--expert --steps 3000 --out {run_dir}/data",
    },
    run_dir="runs/smoke",  # beside real runs, never among them
    rows=[
        Row("bc", "romi_cql", HOPPER, f"{CQL} --model-ratio 0 --bc-warmup 40"),
        Row("cql", "romi_cql", HOPPER, f"{CQL} --model-ratio 0"),
        Row("romi_cql", "romi_cql", HOPPER, f"{CQL} {ONCE} --rollout-policy cvae"),
        Row("romi_cql_rbc", "romi_cql", HOPPER, f"{CQL} {ONCE} --rollout-policy rbc", model_of="romi_cql"),
        Row("bcq", "romi_bcq", MAZE, f"{BCQ} --vae-hidden 16 --model-ratio 0"),
        Row("fomi_bcq", "fomi_bcq", MAZE, f"{BCQ} {ONCE}"),
        Row("romi_bcq", "romi_bcq", MAZE, f"{BCQ} {ONCE}"),
        Row("sac", "mopo", HOPPER, "--model-ratio 0"),
        Row("mopo", "mopo", HOPPER, AGAIN),
        Row("mbpo", "mopo", HOPPER, f"{AGAIN} --penalty-coef 0", model_of="mopo"),
        Row("combo_cql", "combo", HOPPER, "--cql-samples 2 --model-ratio 0"),
        Row("combo", "combo", HOPPER, f"{AGAIN} --cql-samples 2", model_of="mopo"),
        Row("atac", "armor", HOPPER, f"{GAME} --model-ratio 0"),
        Row("armor", "armor", HOPPER, GAME),
        Row("bc_expert", "sra_iql", MAZE, f"{SRA} --iql-weight 0"),
        Row("uds_iql", "sra_iql", MAZE, f"{SRA} --model-ratio 0"),
        Row("sra_iql", "sra_iql", MAZE, SRA),
        *(Row(f"{kind}_{x}", f"sra_{x}", MAZE, f"{SRA}{flags}", "sra_iql") for x in LEARNERS for kind, flags in WITH_AND_WITHOUT),
    ],
)

# What two cores can do in about a day, two runs at a time: fewer updates than the papers', everything else theirs.
WARMUP, HALF = "--bf16 --bc-warmup 10000", "--bf16 --dynamics-bf16"  # warm-up: 40 000 by default, of a million updates
SOON = "--dynamics-optimizer adam --dynamics-max-epochs 3"  # plain SGD needs more of a day than there is
LAPTOP = Suite(
    flags="--num-threads 1",
    data={"hopper-medium-replay": "bundled", "maze2d-umaze": "generated"},
    rows=[
        Row("bc", "romi_cql", HOPPER, "--total-updates 60000 --bc-warmup 60000 --model-ratio 0"),  # drawn by return
        Row("bc_uniform", "romi_cql", HOPPER, "--total-updates 60000 --bc-warmup 60000 --model-ratio 0 --priority-policy False"),
        Row("cql", "romi_cql", HOPPER, f"--total-updates 60000 {WARMUP} --model-ratio 0"),
        Row("romi_cql", "romi_cql", HOPPER, f"--total-updates 60000 {WARMUP}"),
        Row("sac", "mopo", HOPPER, "--total-updates 200000 --model-ratio 0", seeds=(0,)),
        Row("mopo", "mopo", HOPPER, f"--total-updates 200000 {HALF} --dynamics-max-epochs 100"),
        Row("mbpo", "mopo", HOPPER, f"--total-updates 200000 {HALF} --dynamics-max-epochs 100 --penalty-coef 0", "mopo", (0,)),
        Row("combo", "combo", HOPPER, f"--total-updates 50000 {HALF} --dynamics-max-epochs 100", "mopo", (0,)),
        Row("atac", "armor", HOPPER, "--total-updates 100000 --bf16 --model-ratio 0", seeds=(1, 2, 3)),  # 0 led to the choice of lambda
        Row("armor", "armor", HOPPER, f"--total-updates 100000 {HALF} --dynamics-max-epochs 100", seeds=(1, 2, 3)),
        Row("bcq", "romi_bcq", MAZE, "--total-updates 100000 --bf16 --model-ratio 0"),
        Row("fomi_bcq", "fomi_bcq", MAZE, "--total-updates 100000 --bf16 --dynamics-max-epochs 25"),
        Row("romi_bcq", "romi_bcq", MAZE, "--total-updates 100000 --bf16 --dynamics-max-epochs 25"),
        Row("bc_expert", "sra_iql", MAZE, "--total-updates 200000 --bf16 --iql-weight 0"),
        Row("uds_iql", "sra_iql", MAZE, "--total-updates 200000 --bf16 --model-ratio 0"),
        Row("sra_iql", "sra_iql", MAZE, f"--total-updates 200000 {HALF} {SOON}"),
        *(Row(f"uds_{x}", f"sra_{x}", MAZE, "--total-updates 100000 --bf16 --model-ratio 0", seeds=(0,)) for x in LEARNERS),
        *(Row(f"sra_{x}", f"sra_{x}", MAZE, f"--total-updates 100000 {HALF} {SOON}", "sra_iql", (0,)) for x in LEARNERS),
    ],
)

# The papers' tables, with default settings on D4RL's files. Not there: antmaze, which has no evaluation environment here, and
# adroit. halfcheetah-jump and ant-angle have no official data: `python datasets/mujoco.py` makes them.
MAZES = tuple(f"maze2d-{size}{reward}" for reward in ("", "-dense") for size in ("umaze", "medium", "large"))
ROBOTS = ("hopper", "walker2d", "halfcheetah")
NINE = tuple(f"{robot}-{kind}" for kind in ("medium", "medium-replay", "medium-expert") for robot in ROBOTS)
TWELVE = (*(f"{robot}-random" for robot in ROBOTS), *NINE)
JUMPS = ("halfcheetah-jump", "ant-angle")
IMITATION = (*MAZES, *(f"{robot}-{kind}" for kind in ("medium", "medium-expert") for robot in (*ROBOTS, "ant")))
COMBINED = (*(m for m in MAZES if "dense" not in m), *(f"{robot}-medium" for robot in (*ROBOTS, "ant")))  # SRA, Table 4
FOUR = (0, 1, 2, 3)
PAPER = Suite(
    data=dict.fromkeys(JUMPS, "generated"),
    rows=[
        Row("bc_uniform", "romi_cql", (*TWELVE, *MAZES), "--model-ratio 0 --bc-warmup 1000000 --priority-policy False"),
        Row("cql", "romi_cql", TWELVE, "--model-ratio 0"),  # as ROMI-CQL samples: by return
        Row("romi_cql", "romi_cql", TWELVE),  # ROMI, Table 2
        Row("bcq", "romi_bcq", MAZES, "--model-ratio 0"),
        Row("fomi_bcq", "fomi_bcq", MAZES),  # ROMI, Table 3
        Row("romi_bcq", "romi_bcq", MAZES),  # ROMI, Tables 1 and 3
        Row("sac", "mopo", (*TWELVE, *JUMPS), "--model-ratio 0"),
        Row("mopo", "mopo", (*TWELVE, *JUMPS)),  # MOPO, both tables
        Row("mbpo", "mopo", (*TWELVE, *JUMPS), "--penalty-coef 0", model_of="mopo"),
        Row("combo_cql", "combo", TWELVE, "--model-ratio 0"),  # uniform sampling
        Row("combo", "combo", TWELVE, model_of="mopo"),  # COMBO, as others quote it
        Row("atac", "armor", NINE, "--model-ratio 0"),
        Row("armor", "armor", NINE),  # ARMOR, Table 1
        Row("bc_expert", "sra_iql", IMITATION, "--iql-weight 0", seeds=FOUR),
        Row("uds_iql", "sra_iql", IMITATION, "--model-ratio 0", seeds=FOUR),
        Row("sra_iql", "sra_iql", IMITATION, seeds=FOUR),  # SRA, main table
        *(Row(f"{kind}_{x}", f"sra_{x}", COMBINED, flags, "sra_iql", FOUR) for x in LEARNERS for kind, flags in WITH_AND_WITHOUT),
    ],
)

SUITES = {"smoke": SMOKE, "laptop": LAPTOP, "paper": PAPER}

# Cases of `benchmark.py speed` that one update consists of; a row that is not named here takes its script's. A model takes
# MODEL_STEPS steps, as a rule of thumb: the one of hopper-medium-replay, bundled data, stopped by itself after 150 000.
CASES = {
    "romi_cql": {"cql update": 1},
    "romi_bcq": {"bcq update": 1},
    "fomi_bcq": {"bcq update": 1},
    "mopo": {"mopo update": 1, "mopo rollout of 250 000 rows": 1 / 1000},
    "sac": {"mopo update": 1},
    "combo": {"combo update": 1, "mopo rollout of 250 000 rows": 1 / 1000},
    "combo_cql": {"cql update": 1},
    "armor": {"armor update": 1},
    "atac": {"atac update": 1},
    "sra_iql": {"iql update, 512 rows": 1},
    "sra_td3bc": {"td3+bc update, 512 rows": 1},
    "sra_awac": {"awac update, 512 rows": 1},
    "sra_sacn": {"sac-n update, 512 rows": 1},
    "bc": {"bc update": 1},
    "bc_uniform": {"bc update": 1},
    "bc_expert": {"bc update": 1},
}
MODEL_STEPS = 200_000
SRA_EPOCH = 3_900  # steps of SRA's model over a million rows; 20 epochs by default
WARM_START = 100_000  # updates of ARMOR and ATAC before the game, each about as long as one of ATAC


# --- from rows to commands ---


@dataclass
class Job:
    """One command, and how to see that it has done its work."""

    name: str
    command: list[str]
    folder: Path  # of the run; of a preparation, the file that it makes
    log: Path
    updates: int | None = None  # None: a preparation
    after: tuple[str, ...] = ()  # names of jobs that have to be finished first
    row: str = ""
    script: str = ""
    trains_model: bool = False

    def finished(self):
        if self.updates is None:
            return self.folder.exists()
        try:  # who went on beyond the suite's updates has made them, too
            return json.loads((self.folder / "result.json").read_text())["updates"] >= self.updates
        except FileNotFoundError:
            return False


def parse_flags(tokens):
    """["--a", "1", "--b_c=2", "--d"] -> {"a": ["1"], "b-c": ["2"], "d": []}; the last of a name counts."""
    flags, values = {}, None
    for token in tokens:
        if token.startswith("--"):
            name, _, value = token[2:].partition("=")
            values = flags[name.replace("_", "-")] = [value] if "=" in token else []
        elif values is None:
            raise UserError(f"{token}: flags begin with --")
        else:
            values.append(token)
    return flags


def as_tokens(flags):
    return [token for name, values in flags.items() for token in (f"--{name}", *values)]


@functools.cache
def parsed(script, tokens):
    """The script's Args of these flags."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(importlib.import_module(script).Args, args=list(tokens))
    except SystemExit:
        why = [" ".join(line.split()) for line in re.sub("[╭╮╰╯─│]", "", said.getvalue()).splitlines()]
        why = " ".join(line for line in why if line and not re.match("For full helptext|(Unrecognized|Parsing|Missing)[^:]*$", line))
        raise UserError(f"{script}.py does not take its flags: {why}; see python algorithms/{script}.py --help") from None


def source_of(dataset):
    """How the data's source stands in a run's name."""
    path = Path(dataset)
    if dataset == "auto":
        raise UserError("--dataset auto: the data source is part of a run's name; name it, such as d4rl or bundled")
    source = {"d4rl": "", "bundled": "__bundled", "generated": "__generated"}.get(dataset, "__minari")
    return f"__{path.stem}" if path.suffix in (".hdf5", ".h5") or path.exists() else source


@functools.cache
def settled(script, env, dataset, tokens):
    """(updates, is a model needed) of a run, by the script's own rules."""
    task = parse_task(env)
    args = replace(parsed(script, tokens), env=env, dataset=dataset)
    with contextlib.redirect_stderr(io.StringIO()):
        args = importlib.import_module(script).resolve(args, task)
    return args.total_updates, getattr(args, "model_ratio", 0) > 0


def expand(name, run_dir=None, only="", seeds=(), threads=None, extra=()):
    """The jobs of a suite whose names contain one of the words of `only` (or fit it, as fnmatch does: hopper*__cql__*), and those
    they depend on: preparations, then runs that lend a model. Scripts of other runs are not asked whether they take `extra`."""
    suite, words = SUITES[name], only.split() or [""]
    run_dir = str(run_dir or os.path.relpath(ROOT / suite.run_dir))
    jobs, logs = {}, Path(run_dir) / "benchmark_logs"
    for file, flags in suite.prepare.items():
        file, flags = file.format(run_dir=run_dir), flags.format(run_dir=run_dir)
        command = [sys.executable, os.path.relpath(ROOT / "datasets" / "maze2d.py"), *shlex.split(flags)]
        jobs[file] = Job(Path(file).stem, command, Path(file), logs / f"{Path(file).stem}.log")
    rows = [row for row in suite.rows if (ROOT / "algorithms" / f"{row.script}.py").exists()]
    runs = [(row, seed, task) for row in rows for seed in seeds or row.seeds or suite.seeds for task in row.tasks]
    if taken := {"env", "env-id", "exp-name", "seed", "run-dir"} & parse_flags(extra).keys():
        raise UserError(f"--{min(taken)}: is the suite's; see --only, --seeds, --run-dir")

    def job_name(row, seed, task):
        given = parse_flags(shlex.split(f"{suite.flags} {row.flags}")) | parse_flags(extra)
        data = given.get("dataset", [suite.data.get(task, "d4rl")])[-1].format(run_dir=run_dir)
        return f"{parse_task(task).slug}__{row.name}__{seed}{source_of(data)}"

    chosen = {run: job_name(*run) for run in runs}
    chosen = {run: title for run, title in chosen.items() if any(word in title or fnmatch.fnmatchcase(title, word) for word in words)}
    if not chosen:
        raise UserError(f"--only {only}: no run of the suite {name} has that in its name; --dry-run shows them")
    by_name = {row.name: row for row in rows}
    runs = [run for run in runs if run in chosen or any((by_name.get(row.model_of), *at) == run for row, *at in chosen)]
    lenders = {}
    for row, seed, task in sorted(runs, key=lambda run: (run[0].model_of is not None, run[1])):  # seed by seed, all tasks of each
        data = suite.data.get(task, "d4rl")
        flags = {"env": [task], "exp-name": [row.name], "dataset": [data]} | parse_flags(shlex.split(f"{suite.flags} {row.flags}"))
        flags = {k: [v.format(run_dir=run_dir) for v in values] for k, values in flags.items()}
        flags |= {"num-threads": [str(threads)]} if threads else {}
        flags |= parse_flags(extra) | {"run-dir": [run_dir]}
        rest = as_tokens({k: v for k, v in flags.items() if k not in ("env", "dataset")})
        updates, trains = settled(row.script, flags["env"][0], flags["dataset"][0], tuple(rest))
        flags |= {"seed": [str(seed)]}
        title = job_name(row, seed, task)
        after = tuple(jobs[v].name for values in flags.values() for v in values if v in jobs)
        if row.model_of and trains:
            if (row.model_of, task, seed) not in lenders:
                raise UserError(f"suite {name}: {row.name} takes the model of {row.model_of}, which does not stand above it")
            lender = lenders[row.model_of, task, seed]
            flags |= {"dynamics-from": [str(lender.folder)]}
            after, trains = (*after, lender.name), False
        command = [sys.executable, os.path.relpath(ROOT / "algorithms" / f"{row.script}.py"), *as_tokens(flags)]
        log = logs / f"{title}.log"
        job = Job(title, command, Path(run_dir) / title, log, updates, after, row.name, row.script, trains)
        if title in jobs:
            raise UserError(f"suite {name}: two runs are called {title}")
        jobs[title] = lenders[row.name, task, seed] = job
    wanted = {*chosen.values()}
    needed = {other for job in jobs.values() if job.name in wanted for other in job.after}
    needed |= {other for job in jobs.values() if job.name in needed for other in job.after}
    return [job for job in jobs.values() if job.name in wanted or job.name in needed]


def data_to_make(jobs):
    """What to type for generated data that are not there; those of mazes are made on first use."""
    flags = [parse_flags(job.command[2:]) for job in jobs if job.script and not job.finished()]
    tasks = {flag["env"][0]: parse_task(flag["env"][0]) for flag in flags if flag["dataset"] == ["generated"]}
    tasks = [task for _, task in sorted(tasks.items()) if task.domain != "maze2d"]
    tasks = [task for task in tasks if not (utils.GENERATED / f"{task.domain}_{task.kind.replace('-', '_')}.hdf5").exists()]
    return [f"python datasets/mujoco.py --env {task.domain} --kinds {task.kind}" for task in tasks]


def hours(job, ms):
    """Estimated hours of a run from milliseconds per case; None if a case of it has not been timed."""
    cases = {case: job.updates * calls for case, calls in (CASES.get(job.row) or CASES.get(job.script, {"": 0})).items()}
    if job.script == "armor":
        cases["atac update"] = cases.get("atac update", 0) + WARM_START
    if "--bf16" in job.command:
        cases = {f"{case}, bf16" if f"{case}, bf16" in ms else case: calls for case, calls in cases.items()}
    if job.trains_model:
        step, steps = "dynamics step", MODEL_STEPS
        if job.script.startswith("sra_"):
            epochs = parse_flags(job.command[2:]).get("dynamics-max-epochs", [20])
            step, steps = "sra model step", SRA_EPOCH * int(epochs[0])
        half = f"{step}, bf16"
        cases[half if "--dynamics-bf16" in job.command and half in ms else step] = steps
    return sum(ms[case] * calls for case, calls in cases.items()) / 3.6e6 if cases.keys() <= ms.keys() else None


# --- W&B ---


def sweeps():
    """File name -> text of a W&B grid sweep, env x seed, for every algorithm of the paper suite."""
    files = {}
    for row in SUITES["paper"].rows:
        tasks = [task for task in row.tasks if task not in SUITES["paper"].data]
        flags = ["--track", "--dataset", "d4rl", "--exp-name", row.name, *shlex.split(row.flags)]
        command = ["${env}", "${interpreter}", "${program}", *flags, "${args}"]
        files[f"{row.name}.yaml"] = SWEEP.format(
            name=row.name, script=row.script, tasks="".join(f"\n      - {task}" for task in tasks),
            seeds=list(row.seeds or SUITES["paper"].seeds), command="".join(f'\n  - "{part}"' for part in command),
        )  # fmt: skip
    return files


SWEEP = """\
# Made by `python benchmark.py sweeps` of the suite `paper`; from the repository's root:
#   wandb sweep sweeps/{name}.yaml      # prints the sweep's id
#   wandb agent <id>                    # on as many machines as you like; each takes the next run
program: algorithms/{script}.py
name: {name}
project: rewind
method: grid
metric:
  name: eval/normalized_score
  goal: maximize
parameters:
  env:
    values:{tasks}
  seed:
    values: {seeds}
command:{command}
"""
