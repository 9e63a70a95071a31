"""Benchmarks of the scripts in algorithms/, from the project's root:

python -m benchmark run smoke                # every script end to end in minutes; suites: benchmark/suites.toml
python -m benchmark run headline --jobs 2    # repeat to resume; finished runs are skipped
python -m benchmark run paper --slurm --jobs 100 --gpus 1 --slurm-options partition=gpu
python -m benchmark collect                  # results of finished runs -> benchmark/results/
python -m benchmark table                    # tables of benchmarks.md; --check: do they match the results?
python -m benchmark plot                     # learning curves -> benchmark/figures/
python -m benchmark case-study runs/maze2d-umaze-v1__{romi_bcq,fomi_bcq,bcq}__0*      # ROMI's Figure 3
python -m benchmark speed                    # milliseconds per update on this machine
python -m benchmark sweeps                   # grid sweeps for W&B agents -> benchmark/sweeps/
"""

import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import submitit
import tyro

from benchmark import case_study, report, speed, suites
from utils import UserError


class Command(submitit.helpers.Checkpointable):
    """A run as a task. If Slurm pre-empts it, submitit requeues it, and the script resumes from its checkpoint."""

    def __call__(self, command):
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        try:
            return child.wait()
        finally:
            child.terminate()  # Ctrl-C and pre-emption must not leave it running


def run(
    suite: tyro.conf.Positional[Literal["smoke", "laptop", "headline", "paper", "antmaze"]],
    jobs: int = 1,
    only: tuple[str, ...] = (),
    run_dir: str = "",
    dry_run: bool = False,
    slurm: bool = False,
    slurm_options: tuple[str, ...] = (),
    gpus: int = 0,
    hours: int = 168,
):
    """Run a suite, `jobs` runs at a time; finished runs are skipped, interrupted ones resume.

    Args:
        suite: see benchmark/suites.toml
        jobs: runs at a time
        only: runs whose names contain one of these words or match one as a pattern, and the runs whose models they use
        run_dir: folder of all runs; default: the suite's
        dry_run: print the commands and exit; those that use another run's model come last
        slurm: submit the runs to Slurm instead of running them here
        slurm_options: for sbatch, such as partition=gpu
        gpus: per run
        hours: time limit of a run; on Slurm it is then requeued
    """
    runs = suites.expand(suite, only, run_dir)
    if jobs < 1:
        raise UserError(f"--jobs {jobs}: at least 1")
    if slurm and not (dry_run or shutil.which("srun")):
        raise UserError("--slurm: there is no srun on this machine")
    if dry_run:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # | head; not while runs are on, which would outlive us
        return print("\n".join(shlex.join(run.command) for run in runs))
    run_dir = runs[0].folder.parent
    if suite == "smoke" and not (run_dir / "data" / "maze2d_umaze.hdf5").exists():
        for flags in (["--expert", "--steps=3000"], ["--steps=20000"]):
            if subprocess.run([sys.executable, "datasets/maze2d.py", *flags, f"--out={run_dir}/data"]).returncode:
                raise UserError(f"datasets/maze2d.py {' '.join(flags)} failed")
    executor = submitit.AutoExecutor(folder=run_dir / "benchmark_logs", cluster="slurm" if slurm else "local")
    executor.update_parameters(timeout_min=60 * hours, gpus_per_node=gpus, stderr_to_stdout=True)
    if slurm_options:
        options = {k: v or True for k, _, v in (option.partition("=") for option in slurm_options)}
        executor.update_parameters(slurm_additional_parameters=options)
    failed = work_off(runs, jobs, executor)
    print(f"{sum(run.finished() for run in runs)} of {len(runs)} runs of the suite {suite} are finished")
    if suite == "smoke":
        print("toy sizes: the scores mean nothing")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
        sys.exit(1)


def work_off(runs, jobs, executor):
    """Submit unfinished runs, `jobs` at a time, those that lend a model first. Returns the names of failed ones."""
    waiting, running, failed = [run for run in runs if not run.finished()], {}, []
    unfinished = {run.name for run in waiting}
    try:
        while waiting or running:
            for run in [*waiting]:
                if run.lender in failed:
                    failed.append(run.name)
                    print(f"{run.name}: not started, {run.lender} failed", file=sys.stderr)
                elif len(running) == jobs or run.lender in unfinished:
                    continue
                else:
                    running[run] = executor.submit(Command(), run.command)
                    print(f"{run.name}: started, {running[run].paths.stdout}", flush=True)
                waiting.remove(run)
            for run, job in [*running.items()]:
                if job.done():
                    del running[run]
                    if run.finished():
                        unfinished.remove(run.name)
                        print(f"{run.name}: finished", flush=True)
                    else:
                        failed.append(run.name)
                        said = "\n".join((job.stdout() or "").splitlines()[-12:])
                        print(f"{run.name}: failed, {job.paths.stdout} ends with\n{said}", file=sys.stderr)
            time.sleep(0.2)
    finally:
        for job in running.values():
            job.cancel()
        while not all(job.done() for job in running.values()):
            time.sleep(0.1)
    return failed


def collect(
    folders: tyro.conf.Positional[tuple[Path, ...]] = (Path("runs"),), out: Path = report.RESULTS, force: bool = False
):
    """Copy result.json and evaluations of finished runs to benchmark/results/, the source of the tables.

    Only a continuation of the same run replaces an existing result; with --force any run does.
    """
    runs = [f for folder in folders for f in ([folder] if (folder / "result.json").exists() else folder.glob("*"))]
    runs = sorted(f for f in runs if (f / "result.json").exists() and (f / "metrics.jsonl").exists())
    if not runs:
        raise UserError(f"{', '.join(map(str, folders))}: no finished run there")
    for folder in runs:
        target, text = out / folder.name, (folder / "result.json").read_text()
        lines = [x for x in (folder / "metrics.jsonl").read_text().splitlines(keepends=True) if '"eval/return"' in x]
        state = "new"
        if (target / "result.json").exists():
            there, evals = (target / "result.json").read_text(), (target / "evals.jsonl").read_text().splitlines()
            other = "" if there == text else report.differs(json.loads(there), json.loads(text), evals, lines)
            if other and not force:
                print(f"{folder.name}: skipped, the existing result has {other}; --force replaces it", file=sys.stderr)
                continue
            state = "unchanged" if there == text else f"replaces {json.loads(there)['updates']} updates"
        target.mkdir(parents=True, exist_ok=True)
        (target / "result.json").write_text(text)
        (target / "evals.jsonl").write_text("".join(lines))
        print(f"{folder.name}: {json.loads(text)['updates']} updates, {state}")


def sweeps():
    """Write the grid sweeps for W&B agents into benchmark/sweeps/."""
    for path, text in suites.sweep_files().items():
        path.write_text(text)
        print(path)


app = tyro.extras.SubcommandApp()
for command in (run, collect, report.table, report.plot, case_study.case_study, speed.speed, sweeps):
    app.command(command)

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the children, like Ctrl-C
    try:
        app.cli(prog="python -m benchmark", config=(tyro.conf.OmitArgPrefixes,))
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(e.status)
    except KeyboardInterrupt:
        print("interrupted; repeat the command to resume", file=sys.stderr)
        sys.exit(130)
