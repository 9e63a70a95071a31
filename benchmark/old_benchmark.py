"""Benchmarks of the scripts in `algorithms/`: run them, keep their results, and make tables and pictures of those.

    python benchmark.py run smoke                  # every script, every phase, minutes; suites: suites.py
    python benchmark.py run laptop --jobs 2        # finished runs are skipped, cut ones go on: the same command again
    python benchmark.py run paper --dry-run        # the plain commands, for xargs, GNU parallel or sbatch; hours, estimated
    python benchmark.py run paper --slurm --slurm-options partition=gpu gres=gpu:1      # needs `pip install submitit`
    python benchmark.py run laptop --seeds 3 4 -- --bf16          # what follows -- goes to every run
    python benchmark.py collect                    # results of finished runs -> results/, what the tables rest on
    python benchmark.py table                      # tables of results/ -> benchmarks.md; --check: are they what stands there?
    python benchmark.py plot                       # learning curves and bars of results/ -> figures/
    python benchmark.py sweeps                     # W&B grid sweeps of the suite `paper` -> sweeps/
    python benchmark.py speed                      # every case on this machine, six minutes or more
    python benchmark.py speed --device cuda --compile --out results/speed_<machine>.json

`speed` times each case in rounds: in every round the machine's own matrix product is timed beside it, so that noise of a
shared machine hits both alike, and the share (rate of the case over rate of the product) can be compared between machines.
Known and target milliseconds are those of cases() below, on two idle cores at 180 GFLOP/s.
"""

import contextlib
import datetime
import importlib
import itertools
import json
import os
import platform
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import report
import suites
from utils import UserError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "algorithms"))


# --- speed ---


@dataclass
class Speed:
    """Updates per second of every algorithm, the arithmetic they need, and the share of the machine's matrix rate they reach."""

    only: str = ""  # cases whose name contains this
    rounds: int = 15  # timings per case; the median counts
    device: str = "cpu"
    num_threads: int = 2
    compile: bool = False  # torch.compile the losses
    out: Path | None = None  # also write the rows as JSON


def cases(args):
    """name -> (function to time, how many units one call makes, unit, known time of another code in ms, our target in ms).

    Known times: two idle cores of an AMD EPYC at 180 GFLOP/s in float32; CORL's CQL and OfflineRL-Kit's dynamics step, SAC and
    COMBO at hopper's sizes, the ROMI authors' BCQ at maze2d's. Random data of these shapes; speed does not depend on the values.
    """
    device, O, A = torch.device(args.device), 11, 3
    romi_cql = importlib.import_module("romi_cql")
    romi_cql.keep_freed_memory()
    romi_cql.progress = lambda *a, **k: tqdm(disable=True)
    base = romi_cql.Args(compile=args.compile)

    def batch(B, O, A):
        return [x.to(device) for x in (torch.randn(B, O), 2 * torch.rand(B, A) - 1, torch.randn(B), torch.randn(B, O), torch.zeros(B))]

    rows = batch(256, O, A)
    for bf16 in (False, True):
        agent = romi_cql.CQL(O, A, replace(base, bf16=bf16), device)
        yield f"cql update{', bf16' * bf16}", lambda agent=agent: agent.update(*rows, False, False), 1, "update", 115, 46
    yield "bc update", lambda: agent.update(*rows, True, True), 1, "update", None, None
    romi_bcq, maze_rows = importlib.import_module("romi_bcq"), batch(100, 4, 2)
    for bf16 in (False, True):
        agent = romi_bcq.BCQ(4, 2, romi_bcq.Args(compile=args.compile, bf16=bf16), device)
        yield f"bcq update{', bf16' * bf16}", lambda agent=agent: agent.update(*maze_rows), 1, "update", 31, 17
    x, y = torch.randn(7, 256, O + A, device=device), torch.randn(7, 256, O + 1, device=device)
    for bf16 in (True, False):  # the last one imagines, below
        dynamics = romi_cql.Dynamics(O, A, replace(base, dynamics_bf16=bf16)).to(device)
        opt, loss = dynamics.optimizer(), torch.compile(dynamics.loss) if args.compile else dynamics.loss

        def dynamics_step(opt=opt, loss=loss):
            opt.zero_grad()
            loss(x, y).backward()
            opt.step()

        yield f"dynamics step{', bf16' * bf16}", dynamics_step, 1, "step", 15.7, 8.7
    starts, policy = torch.randn(10_000, O, device=device), romi_cql.UniformPolicy(O, A, base)
    never = lambda obs, act, next_obs: torch.zeros(len(obs), dtype=torch.bool, device=device)  # noqa: E731
    everything = romi_cql.Sampler(len(starts), None, device)
    small = replace(base, horizon=5, model_buffer_size=200_000)

    def imagine():  # 1/20 of a run's 4 000 000 rows
        romi_cql.imagine(starts, dynamics, policy, never, everything, (0.0, 1.0), small)

    yield "imagination of 4 000 000 rows", imagine, 1 / 20, "run", None, 40_000
    data, imagined = torch.randn(400_000, 2 * O + A + 2, device=device), torch.randn(4_000_000, 2 * O + A + 2, device=device)
    sampler = romi_cql.Sampler(len(data), torch.rand(len(data)), device)

    def sample():
        rest = imagined[torch.randint(len(imagined), (26,), device=device)]
        return romi_cql.unpack(torch.cat([data[sampler(230)], rest]), O, A)

    yield "sampling a batch", sample, 1, "batch", None, 0.02 * 46
    mopo, combo = (importlib.import_module(name) for name in ("mopo", "combo"))
    task = importlib.import_module("utils").parse_task("hopper-medium-replay")
    args_of = {m: m.resolve(m.Args(compile=args.compile), task) for m in (mopo, combo)}
    agent = mopo.SAC(O, A, args_of[mopo], device)
    yield "mopo update", lambda agent=agent: agent.update(*rows, 0), 1, "update", 8.1, 4.5
    for bf16 in (False, True):
        agent = combo.COMBO(O, A, replace(args_of[combo], bf16=bf16), device)
        yield f"combo update{', bf16' * bf16}", lambda agent=agent: agent.update(*rows, 128, 0), 1, "update", 270, 67
    actor = mopo.Policy(O, A, args_of[mopo].hidden).to(device)
    yield "mopo rollout of 250 000 rows", lambda: mopo.imagine(starts, dynamics, actor, never, args_of[mopo]), 1, "rollout", None, 2_000
    armor = importlib.import_module("armor")
    half, known = [x[:128] for x in rows], torch.ones(128, device=device)
    for bf16 in (False, True):
        given = armor.Args(compile=args.compile, bf16=bf16)
        atac_args, armor_args = (armor.resolve(replace(given, model_ratio=r), task) for r in (0.0, 0.5))
        atac = armor.ARMOR(O, A, atac_args, device)
        yield f"atac update{', bf16' * bf16}", lambda atac=atac: atac.update(*rows), 1, "update", 17.2, 9.5
        game = armor.ARMOR(O, A, armor_args, device, dynamics=armor.Dynamics(O, A, armor_args).to(device), terminates=never)
        game.reference = armor.Reference({"policy": game.policy.state_dict()}).to(device)
        rollouts = armor.Rollouts(starts, A, 128, never, armor_args, device)

        def armor_update(game=game, rollouts=rollouts):  # the whole of it: both players and the step of the rollouts
            game.update(*half, known, rollouts.sample(128))
            rollouts.advance(1, half[0], game.policy, game.reference, game.dynamics)

        yield f"armor update{', bf16' * bf16}", armor_update, 1, "update", None, 30
    torch.set_flush_denormal(True)  # as SRA's main(): weight decay makes denormal numbers in a long timing, too
    maze, rows_512 = importlib.import_module("utils").parse_task("maze2d-umaze"), batch(512, 4, 2)
    sra_iql = importlib.import_module("sra_iql")
    for bf16 in (False, True):
        settings = sra_iql.resolve(sra_iql.Args(compile=args.compile, dynamics_bf16=bf16), maze)
        model = sra_iql.ReverseDynamics(4, 2, settings).to(device)
        opt, x, y = model.optimizer(), torch.randn(7, 256, 6, device=device), torch.randn(7, 256, 4, device=device)

        def model_step(model=model, opt=opt, x=x, y=y):
            opt.zero_grad()
            (model(x) - y).square().mean((1, 2)).sum().backward()
            sra_iql.clip_member_gradients(list(model.parameters()), 1.0)
            opt.step()

        yield f"sra model step{', bf16' * bf16}", model_step, 1, "step", None, None
    learners = {
        "iql update, 512 rows": ("sra_iql", "IQL", 14.8, 8.2),  # CORL: 7.4 for 256 rows
        "td3+bc update, 512 rows": ("sra_td3bc", "TD3BC", None, None),
        "awac update, 512 rows": ("sra_awac", "AWAC", None, None),
        "sac-n update, 512 rows": ("sra_sacn", "SACN", None, None),
    }
    for name, (script, learner, known, target) in learners.items():
        sra = importlib.import_module(script)
        for bf16 in (False, True):
            settings = sra.resolve(sra.Args(compile=args.compile, bf16=bf16), maze)
            agent = getattr(sra, learner)(sra.Normalizer(rows_512[0]), 4, 2, settings, device)
            yield f"{name}{', bf16' * bf16}", lambda agent=agent: agent.update(*rows_512, 0), 1, "update", known, target


def timed(fn, device, at_least=0.25):
    """Seconds per call with warm caches, as in a training loop; the matrix product before it has emptied them."""
    fn()
    calls, spent = 0, 0.0
    begin = time.perf_counter()
    while spent < at_least:
        fn()
        if device == "cuda":
            torch.cuda.synchronize()
        calls, spent = calls + 1, time.perf_counter() - begin
    return spent / calls


def gflop(fn):
    """Arithmetic of the matrix products of one call, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        fn()
    return counter.get_total_flops() / 1e9


def speed(args: Speed):
    """Updates per second, arithmetic, share of the machine's matrix rate."""
    torch.set_num_threads(args.num_threads)
    torch.manual_seed(0)
    a, b = torch.randn(2, 2048, 2048, device=args.device)
    half = a.bfloat16(), b.bfloat16()
    rows = []
    machine = f"torch {torch.__version__}, {args.device}, {args.num_threads} threads{', compiled' * args.compile}"
    print(f"{machine}; medians of {args.rounds} rounds")
    titles = ("ms", "per s", "GFLOP", "GFLOP/s", "matrix rate", "share", "known ms", "target ms")
    print(f"{'':30s}" + "".join(f"{t:>12s}" for t in titles))
    for name, fn, units, unit, known, target in cases(args):
        if args.only not in name:
            continue
        product = half if "bf16" in name else (a, b)
        for _ in range(3):
            fn()
        times, rates = [], []
        for _ in range(args.rounds):
            times.append(timed(fn, args.device) / units)
            rates.append(2 * 2048**3 / timed(lambda product=product: product[0] @ product[1], args.device) / 1e9)
        ms, rate, work = 1e3 * statistics.median(times), statistics.median(rates), gflop(fn) / units
        share = statistics.median(work / t / r for t, r in zip(times, rates, strict=True))
        cells = [f"{ms:.2f}", f"{1e3 / ms:.2f}", f"{work:.2f}", f"{work / ms * 1e3:.0f}", f"{rate:.0f}", f"{share:.0%}"]
        cells += [f"{x:g}" if x else "-" for x in (known, target)]
        print(f"{name:30s}" + "".join(f"{c:>12s}" for c in cells), flush=True)
        rows.append({"case": name, "unit": unit, "ms": ms, "gflop": work, "matrix_gflop_s": rate, "share": share})
        rows[-1] |= {"known_ms": known, "target_ms": target}
    if args.out:
        facts = {"torch": torch.__version__, "threads": args.num_threads, "device": args.device, "compile": args.compile}
        facts |= {"machine": machine_name(args.device), "date": datetime.date.today().isoformat(), "rounds": args.rounds}
        args.out.write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")


def machine_name(device):
    if device == "cuda":
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError, AttributeError):
        return re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()).group(1)
    return platform.processor() or platform.machine()


# --- run ---


@dataclass
class RunSuite:
    """Run a suite: what is finished is skipped, what was cut goes on. Several of these may work at one suite side by side."""

    suite: tyro.conf.Positional[Literal["smoke", "laptop", "paper"]]
    flags: tyro.conf.Positional[tuple[str, ...]] = ()  # after --: for every run, they win over the suite's
    jobs: int | None = None  # runs at a time; None: 1, on Slurm as many as it gives
    threads: int | None = None  # --num-threads of every run; None: the suite's
    only: str = ""  # runs whose name contains one of these words or fits the pattern (`*`), and those whose models they take
    seeds: tuple[int, ...] = ()  # (): the suite's
    run_dir: Path | None = None  # None: runs, for the smoke suite runs/smoke
    dry_run: bool = False  # print the commands and end
    slurm: bool = False  # submit them as a Slurm array
    slurm_options: tuple[str, ...] = ()  # of sbatch, such as partition=gpu gres=gpu:1 time=1440


def run(args: RunSuite):
    """Run a suite of runs, on this machine or on Slurm."""
    for name in ("jobs", "threads"):
        if (number := getattr(args, name)) is not None and number < 1:
            raise UserError(f"--{name} {number}: at least 1")
    jobs = suites.expand(args.suite, args.run_dir, args.only, args.seeds, args.threads, args.flags)
    if args.suite != "smoke":
        print_hours(jobs, args.jobs or 1)
    for command in suites.data_to_make(jobs):
        print(f"note: its data have to be made first, in hours: {command}", file=sys.stderr)
    if args.dry_run:
        stage = {}
        for job in jobs:  # after those whose data or model it takes
            stage[job.name] = 1 + max((stage[name] for name in job.after), default=-1)
        sizes = [list(stage.values()).count(k) for k in range(max(stage.values()) + 1)]
        if len(sizes) > 1:
            ends = list(itertools.accumulate(sizes))
            groups = ", then ".join(f"{end - size + 1}-{end}" if size > 1 else f"{end}" for size, end in zip(sizes, ends, strict=True))
            print(f"note: lines {groups}: each group takes data or models that the one before it has made", file=sys.stderr)
        return print("\n".join(shlex.join(job.command) for job in sorted(jobs, key=lambda job: stage[job.name])))
    if args.slurm:
        return submit(args, jobs)
    begin = time.time()
    failed = work_off(jobs, args.jobs or 1, args.suite)
    done = [job for job in jobs if job.updates and job.name not in failed]
    for name, text in report.tables([job.folder for job in done]).items():
        print(f"\n### {name}\n\n{text}")
    if args.suite == "smoke":
        print("\ntoy sizes: that these runs ended is all that their scores say")
    minutes = f"{(time.time() - begin) / 60:.1f} minutes"
    print(f"{len(done)} of {sum(bool(job.updates) for job in jobs)} runs of the suite {args.suite} are finished; {minutes}")
    if failed:
        print(f"failed: {', '.join(failed)}; logs: {jobs[0].log.parent}", file=sys.stderr)
        sys.exit(1)


def work_off(jobs, parallel, title):
    """Do what is not finished, `parallel` jobs at a time, each after those it depends on. -> names of those that failed"""
    by_name, running, failed, told = {job.name: job for job in jobs}, {}, [], set()
    waiting = [job for job in jobs if not job.finished()]
    bar = tqdm(total=len(jobs), initial=len(jobs) - len(waiting), desc=title, unit="run", mininterval=0.5 if sys.stderr.isatty() else 30)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number, handler in handlers.items():
        if handler != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, signal.default_int_handler)
    try:
        while waiting or running:
            for job in [*waiting]:
                if len(running) >= parallel:
                    break
                if bad := [name for name in job.after if name in failed]:
                    failed.append(job.name)
                    tqdm.write(f"{job.name}: not started, {bad[0]} failed", file=sys.stderr)
                elif job.finished():  # another process has done it
                    bar.update()
                elif not all(by_name[name].finished() for name in job.after):
                    continue
                elif process := start(job):
                    running[job.name] = process
                else:
                    if job.name not in told:
                        tqdm.write(f"{job.name}: another process is at it; waiting for that", file=sys.stderr)
                    told.add(job.name)
                    continue
                waiting.remove(job)
            for name, process in [*running.items()]:
                if process.poll() is not None:
                    del running[name]
                    if problem := problem_of(by_name[name], process):
                        failed.append(name)
                        tqdm.write(problem, file=sys.stderr)
                    else:
                        bar.update()
            bar.set_postfix_str(f"{len(running)} running, {len(failed)} failed", refresh=False)
            time.sleep(0.2)
    finally:
        bar.close()
        for number in handlers:
            signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must not leave a child behind
        stop(running.values())
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return failed


def start(job):
    """The job's process; None if another process is at it. The lock lies on the log, which the process holds open: it ends with
    the process, whatever becomes of us."""
    import fcntl

    job.log.parent.mkdir(parents=True, exist_ok=True)
    with open(job.log, "ab") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        job.log_begin = log.tell()
        log.write(f"$ {shlex.join(job.command)}\n".encode())
        log.flush()
        # a session of its own: Ctrl-C and Slurm's signals are for us, who then stop it
        return subprocess.Popen(job.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)


def stop(processes):
    for number, seconds in ((signal.SIGTERM, 10), (signal.SIGKILL, 10)):
        left = [process for process in processes if process.poll() is None]
        for process in left:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
        deadline = time.time() + seconds
        while any(process.poll() is None for process in left) and time.time() < deadline:
            time.sleep(0.05)


def problem_of(job, process):
    """What to say of a job that has ended, with the last lines it printed; None if it has done its work."""
    if process.returncode == 0 and job.finished():
        return None
    said = job.log.read_bytes()[job.log_begin :].decode(errors="replace")
    lines = [line for line in re.split(r"[\r\n]+", said) if line.strip()]
    what = f"exit status {process.returncode}" if process.returncode else f"no result for {job.updates} updates"
    return f"{job.name}: {what}; the end of {job.log}:\n" + "\n".join(f"    {line[:300]}" for line in lines[1:][-12:])


class SlurmTask:
    """One job as a task of a Slurm array. When Slurm pre-empts it or its time is up, submitit asks checkpoint() what to submit
    in its place: the same command, which goes on from its last checkpoint."""

    def __call__(self, job):
        while not job.finished():
            process = start(job)
            if process is None:  # what is left of a pre-empted predecessor, or the same suite submitted twice
                time.sleep(5)
                continue
            try:
                process.wait()
            finally:
                stop([process])
            if problem := problem_of(job, process):
                raise RuntimeError(problem)

    def checkpoint(self, job):
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, job)


def submit(args, jobs):
    try:
        import cloudpickle
        import submitit
    except ImportError:
        raise UserError("--slurm needs submitit: pip install submitit") from None
    cloudpickle.register_pickle_by_value(suites)  # a task is sent whole: it imports nothing of ours, and starts in a second
    options = dict(option.partition("=")[::2] for option in args.slurm_options)
    waiting = [job for job in jobs if not job.finished()]
    folder = jobs[0].log.parent / "slurm"
    executor = submitit.AutoExecutor(folder=folder, cluster="slurm", slurm_max_num_timeout=1_000)
    executor.update_parameters(name=f"rewind-{args.suite}", timeout_min=24 * 60, slurm_array_parallelism=args.jobs or 1_000)
    executor.update_parameters(cpus_per_task=args.threads or 1)
    before = {}
    for stage in sorted({depth(job, jobs) for job in waiting}):  # data, runs, runs that take a model from those
        stage_jobs = [job for job in waiting if depth(job, jobs) == stage]
        executor.update_parameters(slurm_additional_parameters=options | before)
        array = executor.map_array(SlurmTask(), stage_jobs)[0].job_id.split("_")[0]
        print(f"submitted {len(stage_jobs)} as array {array}{' '.join(['', *before.values()])}; output: {folder}")
        before = {"dependency": f"afterany:{array}"}
    if not waiting:
        print("everything is finished")


def depth(job, jobs):
    return max((1 + depth(other, jobs) for other in jobs if other.name in job.after), default=0)


def print_hours(jobs, parallel):
    """Estimated hours from a results/speed_*.json: updates, models and rollouts, nothing else. Of several files the one timed with
    the suite's number of threads, then the newest, then the fullest."""
    files = [(json.loads(file.read_text()), file) for file in sorted((ROOT / "results").glob("speed_*.json"))]
    if not files:
        return
    threads = suites.parse_flags(next(job for job in jobs if job.script).command[2:]).get("num-threads")
    facts, file = max(files, key=lambda pair: ([str(pair[0]["threads"])] == threads, pair[0]["date"], len(pair[0]["rows"])))
    ms, rows = {row["case"]: row["ms"] for row in facts["rows"]}, {}
    for job in jobs:
        if job.updates and not job.finished():
            rows.setdefault(job.row, []).append(suites.hours(job, ms))
    machine = f"{facts['machine']}, {facts['threads']} threads, {facts['device']}"
    print(f"hours of what is not finished, estimated from {file.name} ({machine}); evaluations come on top:", file=sys.stderr)
    for row, estimates in rows.items():
        each = f"{estimates[0]:8.1f} h each, {sum(estimates):8.1f} h" if None not in estimates else "not timed"
        print(f"  {row:12s} {len(estimates):4d} runs {each}", file=sys.stderr)
    known = [hours for estimates in rows.values() for hours in estimates if hours is not None]
    together = f"{sum(known):.1f} h" + f", {sum(known) / parallel:.1f} h with --jobs {parallel}" * (parallel > 1)
    print(f"  {'together':12s} {len(known):4d} runs {together:>32s}", file=sys.stderr)


# --- results and sweeps ---


def collect(folders: tyro.conf.Positional[tuple[Path, ...]] = (), out: Path = ROOT / "results", force: bool = False):
    """Copy result.json and the evaluation lines of finished runs (default: all of runs/) to results/, where the tables find them.

    A result that is there already gives way to the same run carried on, and to another one (other data or flags, fewer updates)
    only with --force. Tables and pictures of your own runs alone: `table --results runs`, `plot --results runs`."""
    for folder in folders or (ROOT / "runs",):
        runs = [folder] if is_run(folder) else sorted(filter(is_run, folder.glob("*")))
        if not runs:
            raise UserError(f"{folder}: neither the folder of a run nor a folder of such folders")
        for run in runs:
            if not (run / "result.json").exists():
                print(f"{run.name}: not finished, left out")
                continue
            target, result, state = out / run.name, report.read_result(run), "new"
            lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
            lines = [line for line in lines if '"eval/' in line or '"reference/' in line]
            if (target / "result.json").exists():
                there = report.read_result(target)
                state = "unchanged" if there == result else f"replaces {score(there)}"
                if other := other_run(there, result, (target / "evals.jsonl").read_text().splitlines(), lines):
                    state += f", which had {other}"
                    if not force:
                        print(f"{run.name}: left out, results has one with {other}; --force replaces it", file=sys.stderr)
                        continue
                    (target / "note.txt").unlink(missing_ok=True)  # it was about the other
            target.mkdir(parents=True, exist_ok=True)
            (target / "result.json").write_text((run / "result.json").read_text())
            (target / "evals.jsonl").write_text("".join(lines))
            print(f"{run.name}: {score(result)} ({state})")


def score(result):
    name = "return_mean" if result["normalized_score"] is None else "normalized_score"
    return "not evaluated" if result[name] is None else f"{name.replace('_', ' ')} {result[name]:.1f}"


def is_run(folder):
    return any((folder / name).exists() for name in ("config.json", "result.json"))


def other_run(there, result, lines_there, lines):
    """In what the result that is there is another run than `result`, or a longer one; "" if `result` is the same run carried on:
    same data and flags, and the evaluations that are there among its own. `lines`: of evals.jsonl."""
    flags = [report.training_flags(r.get("command")) for r in (there, result)]
    evals = [{e["update"]: e["eval/return"] for e in map(json.loads, text) if "eval/return" in e} for text in (lines_there, lines)]
    if there == result:
        return ""
    if there["dataset"]["sha256"] != result["dataset"]["sha256"]:
        return "other data"
    if None in (there.get("command"), result.get("command")):
        return "flags that were not recorded"
    if flags[0] != flags[1]:
        return f"other flags ({' '.join(flags[0]) or 'none'})"
    if there["updates"] > result["updates"]:
        return f"{there['updates']} updates"
    return "" if evals[0].items() <= evals[1].items() else "other evaluations, so it was made anew"


def sweeps():
    """Write the W&B sweeps of the suite `paper` into sweeps/."""
    (ROOT / "sweeps").mkdir(exist_ok=True)
    for name, text in suites.sweeps().items():
        (ROOT / "sweeps" / name).write_text(text)
        print(f"sweeps/{name}")


app = tyro.extras.SubcommandApp()
for command in (run, collect, report.table, report.plot, sweeps, speed):
    app.command(command)

if __name__ == "__main__":
    try:
        app.cli(config=(tyro.conf.OmitArgPrefixes,))
    except UserError as e:
        sys.exit(e.report())
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)
