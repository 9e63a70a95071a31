"""Benchmarks of the scripts in `algorithms/`.

    python benchmark.py speed                      # every case on this machine, about two minutes
    python benchmark.py speed --device cuda --compile
    python benchmark.py collect                    # results of finished runs -> results/, what the tables rest on
    python benchmark.py plot                       # learning curves of results/ -> figures/

`speed` times each case in rounds: in every round the machine's own matrix product is timed beside it, so that noise of a
shared machine hits both alike, and the share (rate of the case over rate of the product) can be compared between machines.
Known and target milliseconds are those of cases() below, on two idle cores at 180 GFLOP/s.
"""

import importlib
import json
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "algorithms"))


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
    romi_bcq, maze_rows = importlib.import_module("romi_bcq"), batch(100, 4, 2)
    for bf16 in (False, True):
        agent = romi_bcq.BCQ(4, 2, romi_bcq.Args(compile=args.compile, bf16=bf16), device)
        yield f"bcq update{', bf16' * bf16}", lambda agent=agent: agent.update(*maze_rows), 1, "update", 31, 17
    dynamics = romi_cql.Dynamics(O, A, base).to(device)
    opt, x, y = dynamics.optimizer(), torch.randn(7, 256, O + A, device=device), torch.randn(7, 256, O + 1, device=device)
    loss = torch.compile(dynamics.loss) if args.compile else dynamics.loss

    def dynamics_step():
        opt.zero_grad()
        loss(x, y).backward()
        opt.step()

    yield "dynamics step", dynamics_step, 1, "step", 15.7, 8.7
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
        cells += [f"{known}" if known else "-", f"{target:g}"]
        print(f"{name:30s}" + "".join(f"{c:>12s}" for c in cells), flush=True)
        rows.append({"case": name, "unit": unit, "ms": ms, "gflop": work, "matrix_gflop_s": rate, "share": share})
    if args.out:
        facts = {"torch": torch.__version__, "threads": args.num_threads, "device": args.device, "compile": args.compile}
        args.out.write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")


def collect(folders: tyro.conf.Positional[tuple[Path, ...]] = (), out: Path = ROOT / "results"):
    """Copy result.json and the evaluation lines of finished runs (default: all of runs/) to results/, where the tables find them."""
    for folder in folders or sorted((ROOT / "runs").glob("*/")):
        if (folder / "result.json").exists():
            target = out / folder.name
            target.mkdir(parents=True, exist_ok=True)
            (target / "result.json").write_text((folder / "result.json").read_text())
            lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
            (target / "evals.jsonl").write_text("".join(line for line in lines if '"eval/' in line))
            print(f"{folder.name}: {json.loads((target / 'result.json').read_text())['normalized_score']}")
        else:
            print(f"{folder.name}: not finished, left out")


def plot(results: Path = ROOT / "results", out: Path = ROOT / "figures"):
    """Learning curves: a picture per task and data source, a line per run, a colour per algorithm."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = {}
    for file in sorted(results.glob("*/result.json")):
        result = json.loads(file.read_text())
        groups.setdefault((result["task"], result["dataset"]["source"]), []).append((result, file.parent))
    if not groups:
        sys.exit(f"error: no results in {results}; run `python benchmark.py collect` first")
    out.mkdir(exist_ok=True)
    for (task, source), runs in groups.items():
        figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
        names = sorted({result["algorithm"] for result, _ in runs})
        for result, folder in runs:
            evals = [json.loads(line) for line in (folder / "evals.jsonl").read_text().splitlines()]
            points = [(e["update"], e["eval/normalized_score"]) for e in evals]
            first = result is next(r for r, _ in runs if r["algorithm"] == result["algorithm"])
            style = {"color": f"C{names.index(result['algorithm'])}", "label": result["algorithm"] if first else None}
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1.5, **style)
        axes.set(title=f"{task} ({source} data)", xlabel="gradient updates", ylabel="normalized score")
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(out / f"{task}__{source}.png", dpi=110)
        print(out / f"{task}__{source}.png")


app = tyro.extras.SubcommandApp()
for command in (speed, collect, plot):
    app.command(command)

if __name__ == "__main__":
    app.cli(config=(tyro.conf.OmitArgPrefixes,))
