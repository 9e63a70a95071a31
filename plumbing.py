"""What every script needs that has nothing to do with its method: command line, errors, files, W&B. Imported, never read first."""

import contextlib
import ctypes
import io
import json
import math
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import time
import uuid
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import gymnasium
import mujoco
import numpy as np
import torch
import tyro
from pydantic import Field, TypeAdapter, ValidationError
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent


class UserError(Exception):
    """Something the user can mend; `status` is the exit status (2: bad input, 3: the run diverged)."""

    def __init__(self, message, status=2):
        super().__init__(message)
        self.status = status


# Ranges of settings, for pydantic.
Name = Annotated[str, Field(pattern=r"^[\w.+=-]{1,100}$")]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Decays = Annotated[tuple[NonNegative, ...], Field(min_length=5, max_length=5)]


def run_script(main, args_class, doc):
    """Parse the command line and run main(args). Whatever the user, the operating system or a signal does ends in one line."""

    def stop(signum, frame):
        raise KeyboardInterrupt

    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), stop)
    status, error = 0, None
    try:
        main(
            tyro.cli(args_class, description=doc.split("\n")[0] + " Equations and symbols: the docstring of the file.")
        )
    except UserError as e:
        status, error = e.status, e
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):
            print("interrupted; the same command goes on from the last checkpoint, if there is one", file=sys.stderr)
        status = 130
    except OSError as e:
        status, error = 2, UserError(f"{e.filename or 'the operating system'}: {e.strerror or e}")
    except (MemoryError, RuntimeError) as e:
        if not (isinstance(e, MemoryError | torch.OutOfMemoryError) or "allocate" in str(e)):
            raise
        status, error = 2, UserError("out of memory; try smaller --batch-size, --hidden or --model-buffer-size")
    if error is not None:
        with contextlib.suppress(OSError):
            tqdm.write(
                f"error: {' '.join(str(error).split())}", file=sys.stderr
            )  # a line of its own, whatever bar is drawn
    sys.exit(status)


def validate(args):
    """The arguments, checked against the ranges in their types; UserError names the first flag out of range."""
    try:
        return TypeAdapter(type(args)).validate_python(asdict(args))
    except ValidationError as e:
        first = e.errors()[0]
        flag, why = str(first["loc"][0]).replace("_", "-"), first["msg"].replace("Input should", "must")
        raise UserError(f"--{flag} {str(first['input'])[:80]}: {why}") from None


def start(args):
    """Device, threads, seeds; the torch.device to train on."""
    have = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if args.device != "auto" and not have[args.device]:
        raise UserError(f"--device {args.device}: there is none here; use --device auto")
    torch.set_num_threads(args.num_threads or os.cpu_count())
    random.seed(args.seed)
    np.random.seed(args.seed)
    if args.compile:
        torch._inductor.config.fallback_random = True  # the random numbers of eager mode
    if platform.libc_ver()[0] == "glibc":
        # glibc returns freed blocks to the system and faults them in again at the next update, up to a third of its time;
        # and while it adjusts its thresholds itself, long runs grow by gigabytes. Fixed thresholds cure both.
        for option, value in (
            (-3, 32 << 20),
            (-1, 2**31 - 1),
            (-2, 64 << 20),
        ):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD
            ctypes.CDLL(None).mallopt(option, value)
    return torch.device(args.device if args.device != "auto" else "cuda" if have["cuda"] else "cpu")


def describe_run(script, args, task, data, device, direction, model):
    """What config.json says: the run's name, every setting, what a result depends on beside its flags, and what decides
    its dynamics model (direction, names of flags): another run may take the model if that is equal."""
    source = {"d4rl": "", "file": f"__{Path(data.path).stem}"}.get(data.source, f"__{data.source}")
    modules = {m.__name__: m.__version__ for m in (torch, np, gymnasium, mujoco)} | {
        "python": platform.python_version()
    }
    git = (
        subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True)
        if shutil.which("git")
        else None
    )
    config = {
        "name": f"{task.slug}__{args.exp_name}__{args.seed}{source}",
        "script": Path(script).name,
        "args": asdict(args),
    }
    config |= {"task": task.id, "dataset": data.facts(), "device": str(device), "versions": modules}
    config |= {"command": [Path(script).name, *sys.argv[1:]], "git_commit": git.stdout.strip() or None if git else None}
    decides = {"direction": direction, "data": data.sha256} | {k: config["args"][k] for k in sorted(model)}
    return json.loads(json.dumps(config | {"decides": {"dynamics": decides}, "wandb_id": uuid.uuid4().hex[:8]}))


def differences(ours, theirs, bookkeeping):
    """Names of what decides a result and differs between two configs."""
    if not isinstance(theirs, dict) or not isinstance(theirs.get("args"), dict):
        return ["config, which is none of these scripts'"]
    ours, theirs = ({k: v for k, v in c["args"].items() if k not in bookkeeping} | {k: c.get(k) for k in ("script", "device", "dataset")}
                    for c in (ours, theirs))  # fmt: skip
    for name in ("path", "requested"):
        ours["dataset"], theirs["dataset"] = (
            {k: v for k, v in (c["dataset"] or {}).items() if k != name} for c in (ours, theirs)
        )
    differ = [k for k in sorted(ours | theirs) if ours.get(k) != theirs.get(k)]
    return [
        "data" if k == "dataset" else k if k == "script" else f"--{k.replace('_', '-')} ({theirs.get(k)} there)"
        for k in differ
    ]


def write_file(path, content):
    """Write bytes or text so that a killed run or a power cut never leaves half a file under its name."""
    part = path.with_name(f"{path.name}.part")
    try:
        with open(part, "wb") as f:
            f.write(content.encode() if isinstance(content, str) else content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def save(path, parts, facts):
    """Checkpoint: state dicts by name, random states, facts. UserError where a weight is not finite: the last good file stays."""

    def bad(x):
        if isinstance(x, torch.Tensor):
            return x.is_floating_point() and not x.isfinite().all()
        return any(map(bad, x.values() if isinstance(x, dict) else x if isinstance(x, list | tuple) else ()))

    state = {name: part.state_dict() for name, part in parts.items()}
    if names := [k for k, v in state.items() if bad(v)]:
        keeps = "keeps the last good one" if path.exists() else "is not written"
        raise UserError(f"weights not finite at step {facts['step']}: {', '.join(names)}; {path} {keeps}", status=3)
    rng = [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])]
    buffer = io.BytesIO()
    torch.save(state | facts | {"rng": rng}, buffer)
    write_file(path, buffer.getbuffer())
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)  # gives back what lies free between blocks in use, or long runs creep up


def restore(state, parts, total, path):
    """Put objects and random numbers back as a checkpoint has them; its step."""
    if total is not None and state["step"] > total:
        raise UserError(f"{path} has {state['step']} steps already, more than the {total} asked for")
    for name, part in parts.items():
        part.load_state_dict(state[name])
    torch.set_rng_state(state["rng"][0])
    if len(state["rng"]) > 1 and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["rng"][1])
    return state["step"]


FACTS = ("step", "rng", "config", "log_bytes", "evals", "worked")


def read_folder(folder, config, bookkeeping, total):
    """Checkpoints by phase, and whether the run in the folder is finished; UserError if it is another run."""
    states = {p.stem: read_checkpoint(p, *FACTS) for p in sorted(folder.glob("*.pt"))}
    old, result = folder / "config.json", folder / "result.json"
    theirs = [state["config"] for state in states.values()]
    theirs += [read_json(old)] if old.exists() and (theirs or result.exists()) else []
    if differ := sorted({d for their in theirs for d in differences(config, their, bookkeeping)}):
        raise UserError(f"{folder} holds another run: {', '.join(differ)}; give another --run-dir or --exp-name")
    finished = result.exists() and read_json(result).get("updates") == total
    if result.exists() and not finished and "agent" not in states:
        raise UserError(f"{folder} is finished, but without its agent.pt it cannot be carried on")
    return states, finished


def read_other_run(path, phase, config):
    """Checkpoint of a phase of another run, where all that decides it is equal."""
    state = read_checkpoint(path, *FACTS)
    ours, theirs = (c.get("decides", {}).get(phase, {}) for c in (config, state["config"]))
    if differ := [f"{k} ({theirs.get(k)}, here {v})" for k, v in ours.items() if theirs.get(k) != v]:
        raise UserError(f"--{phase.replace('_', '-')}-from {path}: was made with another {', '.join(differ)}")
    return state


def open_log(path, size):
    """metrics.jsonl, locked as long as it is open, and cut to the `size` in bytes that the last checkpoint knows of: what came
    after it will come again."""
    log = open(path, "a")
    with contextlib.suppress(ImportError):  # Windows has no fcntl
        import fcntl

        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path.parent}: another process is training in it") from None
        except OSError:  # a file system without locks
            pass
    if (lost := size - log.tell()) > 0:
        print(
            f"note: {path} has lost {lost} bytes of the run's log; evaluations are in the checkpoint", file=sys.stderr
        )
    log.truncate(min(size, log.tell()))
    return log


def progress(total, desc, unit, initial=0, **more):
    """Progress bar; a log file gets a line every 30 s."""
    slow = 0.5 if sys.stderr and sys.stderr.isatty() else 30
    return tqdm(total=total, initial=initial, desc=desc, unit=unit, mininterval=slow, **more)


def bar(iterable, desc):
    """A progress bar that leaves no trace: of the batches within an epoch."""
    return tqdm(iterable, desc, leave=False, mininterval=0.5 if sys.stderr and sys.stderr.isatty() else 30)


def compile_methods(agent, *names):
    for name in names:
        mode = "reduce-overhead" if agent.device.type == "cuda" else None
        setattr(agent, name, torch.compile(getattr(agent, name), mode=mode))


class Clock:
    """Seconds worked: not those in which the process was stopped or the machine slept."""

    def __init__(self):
        self.last = time.monotonic(), time.process_time()

    def lap(self):
        now = time.monotonic(), time.process_time()
        wall, cpu = (a - b for a, b in zip(now, self.last, strict=True))
        self.last = now
        return min(wall, cpu)


def write_image(path, image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    write_file(path, buffer.getbuffer())


def read_json(path):
    try:
        content = json.loads(path.read_text())
    except ValueError as e:
        raise UserError(f"{path}: is damaged ({e}); restore it or give another --run-dir") from None
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path}: is none of these scripts' files; restore it or give another --run-dir")
    return content


def read_checkpoint(path, *keys):
    """The dict in a checkpoint, on the CPU; UserError where it is damaged, or lacks one of the keys."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
            if archive.testzip():
                raise ValueError("its checksums do not match")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not state.keys() >= set(keys):
            raise ValueError("it is no checkpoint of these scripts")
    except OSError:
        raise
    except Exception as e:  # whatever the bytes of a damaged file lead to
        raise UserError(f"{path}: cannot be read ({str(e)[:80]}); restore the file or give another --run-dir") from None
    return state


def start_wandb(args, config, folder):
    """The W&B run, or None: without a login or a server it logs offline, for `wandb sync` later, and it never stops a run."""
    try:
        import wandb

        mode = os.environ.get("WANDB_MODE") or (
            "online" if wandb.api.api_key else "offline"
        )  # or it asks, and waits for ever
        for mode in dict.fromkeys((mode, "offline")):
            try:
                task, algorithm = config["name"].split("__")[:2]
                run = wandb.init(
                    project=args.wandb_project_name, entity=args.wandb_entity, name=config["name"], mode=mode, id=config["wandb_id"],
                    group=args.wandb_group or f"{task}__{algorithm}", tags=[config["task"], algorithm, config["dataset"]["source"]],
                    config=config, resume="allow", dir=str(folder), settings=wandb.Settings(init_timeout=30),
                )  # fmt: skip
                run.define_metric("*", step_metric="update")
                if mode == "offline":
                    print(f"W&B: offline; upload with `wandb sync {folder}/wandb/offline-run-*`", file=sys.stderr)
                return run
            except Exception as e:  # whatever it is, a run is not stopped by its logger
                print(f"W&B: {type(e).__name__}: {str(e)[:120]}", file=sys.stderr)
    except ImportError:
        print("W&B: not installed, going on without it", file=sys.stderr)
    return None


def to_wandb(run, call):
    """call(W&B's run), if there is one; whatever happens there stops nothing."""
    if run.wandb:
        try:
            call(run.wandb)
        except Exception as e:
            print(f"W&B: {type(e).__name__}: {str(e)[:120]}; going on without it", file=sys.stderr)
            run.wandb = None


def json_line(row):
    """JSON has no NaN: null."""
    row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(row, allow_nan=False) + "\n"


def score(evals):
    """What the progress bar shows of the last evaluation."""
    last = {k: evals[-1][f"eval/{k}"] for k in ("normalized_score", "return")} if evals else {}
    return dict([(k, v) for k, v in last.items() if v is not None][:1])


def summary(config, args, evals, worked, updates_per_s):
    """What result.json says."""
    last = evals[-1] if evals else {}
    tail = [e["eval/normalized_score"] for e in evals[-10:] if e.get("eval/normalized_score") is not None]
    result = {
        "task": config["task"],
        "script": config["script"],
        "algorithm": args.exp_name,
        "seed": args.seed,
    }
    result |= {"updates": args.total_updates, "normalized_score": last.get("eval/normalized_score")}
    result |= {"normalized_score_last_10": sum(tail) / len(tail) if tail else None}
    result |= {
        "return_mean": last.get("eval/return"),
        "return_std": last.get("eval/return_std"),
        "eval_episodes": args.eval_episodes,
    }
    result |= {"wall_time_s": round(worked, 1), "updates_per_s": round(updates_per_s, 2)}
    return result | {k: config[k] for k in ("dataset", "device", "versions", "git_commit", "command")}
