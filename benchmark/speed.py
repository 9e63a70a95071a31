"""Milliseconds per update of every learner and per epoch of every model, as logged by the scripts."""

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from utils import UserError

# Name -> script, flags and number of timed updates, with the scripts' default networks and batches.
HOPPER, MAZE, SHORT = "--dataset bundled", "--env maze2d-umaze --dataset {maze}", "--dynamics-max-epochs 2"
SRA = f"{MAZE} --expert-dataset {{expert}} --model-ratio 0"
CASES = {
    "bc": ("romi_cql", f"{HOPPER} --model-ratio 0 --bc-warmup 1000000", 1_000),
    "cql": ("romi_cql", f"{HOPPER} --model-ratio 0 --bc-warmup 1", 100),
    "romi_cql": ("romi_cql", f"{HOPPER} {SHORT} --bc-warmup 1 --model-buffer-size 20000", 100),
    "bcq": ("romi_bcq", f"{MAZE} --model-ratio 0", 500),
    "romi_bcq": ("romi_bcq", f"{MAZE} {SHORT} --model-buffer-size 20000", 500),
    "sac": ("mopo", f"{HOPPER} --model-ratio 0", 1_000),
    "mopo": ("mopo", f"{HOPPER} {SHORT}", 1_000),
    "combo": ("combo", f"{HOPPER} {SHORT}", 100),
    "atac": ("armor", f"{HOPPER} --model-ratio 0 --warm-start-updates 10", 500),
    "armor": ("armor", f"{HOPPER} {SHORT} --warm-start-updates 10", 500),
    "iql": ("sra_iql", SRA, 500),
    "td3+bc": ("sra_td3bc", SRA, 500),
    "awac": ("sra_awac", SRA, 500),
    "sac-n": ("sra_sacn", SRA, 100),
}


def measure(tree, name, more, folder):
    """{"update": ms, "epoch": ms} of one short run of a case in a checkout; epochs are timed by their log lines."""
    script, flags, updates = CASES[name]
    flags = flags.format(maze=folder / "maze2d_umaze.hdf5", expert=folder / "maze2d_umaze_expert.hdf5").split()
    flags += [f"--total-updates={updates}", f"--log-every={updates // 5}", "--eval-episodes=0", *more]
    with tempfile.TemporaryDirectory(dir=folder) as runs, open(folder / "log", "w+") as log:
        command = [sys.executable, f"algorithms/{script}.py", *flags, f"--run-dir={runs}"]
        process, stamps = subprocess.Popen(command, cwd=tree, stdout=log, stderr=log), []
        try:
            while process.poll() is None:
                time.sleep(0.02)
                text = "".join(file.read_text() for file in Path(runs).glob("*/metrics.jsonl"))
                stamps += [time.time()] * (text.count('"model/epoch":') - len(stamps))
        finally:
            process.kill()  # if this process is interrupted
        if process.returncode:
            log.seek(0)
            raise UserError(f"{' '.join(command)} failed in {tree}: {log.read()[-500:]}")
        rows = [json.loads(line) for line in next(Path(runs).glob("*/metrics.jsonl")).read_text().splitlines()]
    rates = [row["charts/SPS"] for row in rows if "charts/SPS" in row][1:]  # the first one warms up
    epochs = [1e3 * (b - a) for a, b in zip(stamps, stamps[1:], strict=False)]
    return {"update": 1e3 / statistics.median(rates)} | ({"epoch": statistics.median(epochs)} if epochs else {})


def speed(
    only: tuple[str, ...] = (),
    rounds: int = 3,
    flags: str = "",
    num_threads: int = os.cpu_count() or 1,
    against: tuple[Path, ...] = (),
    out: Path | None = None,
):
    """Milliseconds per update of every learner and per epoch of every model; medians over rounds.

    Args:
        only: cases, such as cql bcq
        flags: more flags for every run, such as --flags=--bf16
        against: other checkouts, timed in turn with this one in every round
        out: also write JSON; benchmark/results/speed_<machine>.json becomes a column of the table
    """
    if unknown := set(only) - CASES.keys():
        raise UserError(f"--only {' '.join(sorted(unknown))}: the cases are {', '.join(CASES)}")
    trees, rows, more = [Path(), *against], [], [f"--num-threads={num_threads}", *flags.split()]
    with tempfile.TemporaryDirectory() as folder:
        for size in (["--steps=100000"], ["--expert", "--steps=3000"]):
            command = [sys.executable, "datasets/maze2d.py", *size, f"--out={folder}"]
            subprocess.run(command, check=True, capture_output=True)
        for name in only or CASES:
            taken = [[measure(tree, name, more, Path(folder)) for tree in trees] for _ in range(rounds)]
            for what in taken[0][0]:
                ms = [statistics.median(each[k][what] for each in taken) for k in range(len(trees))]
                case = f"{name} {what}{', bf16' * ('--bf16' in more)}"
                ratios = [statistics.median(e[0][what] / e[k][what] for e in taken) for k in range(1, len(trees))]
                print(f"{case:24s} {ms[0]:10.2f} ms" + "".join(f", {r:.3f} of theirs" for r in ratios), flush=True)
                rows.append({"case": case, "ms": ms[0], "of_theirs": ratios})
    if out:
        facts = {"machine": platform.processor() or platform.machine(), "threads": num_threads, "rounds": rounds}
        facts |= {"torch": torch.__version__, "date": datetime.date.today().isoformat()}
        out.write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")
