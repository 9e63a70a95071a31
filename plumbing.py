"""What every script needs besides its method: command line, errors, files, W&B."""

import contextlib
import ctypes
import hashlib
import inspect
import io
import json
import math
import os
import platform
import pprint
import random
import re
import signal
import subprocess
import sys
import time
import uuid
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

for _name in ("stdout", "stderr"):  # if the shell closed them, some libraries below do not load
    if getattr(sys, _name) is None:
        setattr(sys, _name, open(os.devnull, "w"))
        os.set_inheritable(getattr(sys, _name).fileno(), True)

import gymnasium
import h5py
import mujoco
import numpy as np
import torch
import tyro
from pydantic import Field, TypeAdapter, ValidationError
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent
FACTS = ("step", "rng", "config", "log_bytes", "evals", "worked")  # in every checkpoint, beside the state dicts

# Ranges of settings, checked by validate().
Name = Annotated[str, Field(pattern=r"^([a-zA-Z0-9.+=-]_?)+$", max_length=100)]  # __ separates parts of a run's name
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Episodes = Annotated[int, Field(ge=0, le=10_000)]
Decays = Annotated[tuple[NonNegative, ...], Field(min_length=5, max_length=5)]


class UserError(Exception):
    """An error that the user can fix; `status` is the exit status (2: bad input, 3: the run diverged)."""

    def __init__(self, message, status=2):
        super().__init__(message)
        self.status = status


# --- command line ---


def run_script(main, args_class, doc):
    """Parse the command line and run main(args). User errors, system errors and signals end in one line."""

    def interrupt(signum, frame):
        raise KeyboardInterrupt

    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):  # Windows has no SIGHUP
            signal.signal(getattr(signal, name), interrupt)
    args, status, error = None, 0, None
    try:
        if {"-h", "--help"} & set(sys.argv[1:]):
            return show_help(args_class, doc)
        args = tyro.cli(args_class)
        main(args)
    except UserError as e:
        status, error = e.status, e
    except KeyboardInterrupt:
        status = 130
    except OSError as e:
        status, error = 2, f"{e.filename or 'the operating system says'}: {e.strerror or e}"
    except (MemoryError, OverflowError, RuntimeError, TypeError, ValueError) as e:
        known = isinstance(e, MemoryError | OverflowError | torch.OutOfMemoryError)
        if not known and not any(word in str(e).lower() for word in ("alloc", "overflow")):
            raise
        status, error = 2, f"out of memory{largest_size(args)}"
    with contextlib.suppress(OSError):  # a broken pipe
        if error:
            tqdm.write(f"error: {' '.join(str(error).split())}", file=sys.stderr)  # on its own line
        elif status:
            tqdm.write("interrupted; repeat the command to resume", file=sys.stderr)
    sys.exit(status)


def show_help(args_class, doc):
    """Flags in the groups of `Args`, with defaults and comments, and the SETTINGS of all tasks."""
    print(doc.split("\n")[0], "More in the file's docstring.")
    for line in inspect.getsource(args_class).splitlines():
        if group := re.match(r"    # --- (.+) ---", line):
            print(f"\n{group[1]}")
        elif field := re.match(r"    (\w+): (.+?) = (.+?)(?:  # (.*))?$", line):
            name, kind, default, comment = field.groups()
            if default.split(".")[-1].isupper():  # a constant's name
                default = str(getattr(args_class, name))
            flag = f"--{name}".replace("_", "-") + (f" / --no-{name}".replace("_", "-") if kind == "bool" else "")
            choices = ", ".join(re.findall(r'"(\w+)"', kind)) or "True, False" * (kind == "bool | None")
            aliases = ", ".join(f"also {alias}" for alias in re.findall(r'"(--[\w-]+)"', kind))
            print(f"  {flag:40} {default:24} {'; '.join(filter(None, (choices, comment, aliases)))}")
    module = inspect.getmodule(args_class)
    if settings := getattr(module, "SETTINGS", None):
        above = re.search(r"((?:^# .*\n)+)SETTINGS", inspect.getsource(module), re.MULTILINE)[1]
        print(f"\nby task\n{above}{pprint.pformat(settings, width=100, sort_dicts=False)}")


def largest_size(args):
    """Names the largest size among the flags, the likely cause of running out of memory."""
    sizes, no_size = {}, ("seed", "updates", "every", "epochs", "horizon", "warmup")
    for name, value in asdict(args).items():
        numbers = [v for v in (value if isinstance(value, tuple) else (value,)) if type(v) is int]
        if numbers and not any(word in name for word in no_size):
            sizes[name] = max(numbers)
    name = max(sizes, key=sizes.get, default="")
    return f"; --{name.replace('_', '-')} {sizes[name]} is the largest size requested" if name else ""


def validate(args):
    """Checks the arguments against the ranges in their types; UserError names the first flag out of range."""
    if getattr(args, "num_elites", 0) > getattr(args, "ensemble_size", 0):
        raise UserError(f"--num-elites {args.num_elites}: the model has {args.ensemble_size} members (--ensemble-size)")
    try:
        return TypeAdapter(type(args)).validate_python(asdict(args))
    except ValidationError as e:
        first = e.errors()[0]
        flag, why = str(first["loc"][0]).replace("_", "-"), first["msg"].replace("Input should", "must")
        why = "must be letters, digits or _.+=-, without __" if first["type"] == "string_pattern_mismatch" else why
        raise UserError(f"--{flag} {str(first['input'])[:80]}: {why}") from None


def start(args):
    """Sets threads, memory and the seeds of Python and NumPy (main sets torch's); returns the torch.device."""
    have = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if args.device != "auto" and not have[args.device]:
        raise UserError(f"--device {args.device} is not available; use --device auto")
    # Adam's moments of dead units decay to denormal numbers, which make its step 5 times slower on a CPU. Flushing them
    # to zero changes no weight. It applies only to threads that start after this call.
    torch.set_flush_denormal(True)
    torch.set_num_threads(args.num_threads)
    random.seed(args.seed)
    np.random.seed(args.seed)
    if args.compile:
        torch._inductor.config.fallback_random = True  # same random numbers as eager mode
    if platform.libc_ver()[0] == "glibc":
        # By default malloc returns freed blocks to the system; faulting them in again takes up to a third of the time
        # of an update. Long runs also grow by gigabytes. Fixed thresholds prevent both.
        M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD = -3, -1, -2
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 32 << 20)
        ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        ctypes.CDLL(None).mallopt(M_TOP_PAD, 64 << 20)
    device = torch.device(args.device if args.device != "auto" else "cuda" if have["cuda"] else "cpu")
    able, halves = torch.cpu.get_capabilities(), [k for k in ("bf16", "dynamics_bf16") if getattr(args, k, False)]
    if device.type == "cpu" and halves and not any(able.get(k) for k in ("avx512_bf16", "amx_bf16", "bf16")):
        flags = " ".join(f"--{k.replace('_', '-')}" for k in halves)
        print(f"warning: this CPU has no bfloat16 instructions; {flags} will be many times slower", file=sys.stderr)
    return device


def compile_methods(agent, *names):
    for name in names:
        mode = "reduce-overhead" if agent.device.type == "cuda" else None
        setattr(agent, name, torch.compile(getattr(agent, name), mode=mode))


def progress(total, desc, unit, initial=0):
    """Progress bar; in a log file, one line every 30 s."""
    slow = 0.5 if sys.stderr.isatty() else 30
    return tqdm(total=total, initial=initial, desc=desc, unit=unit, mininterval=slow)


def bar(iterable, desc):
    """Progress bar of the batches in an epoch; disappears when done."""
    return tqdm(iterable, desc, unit="batch", leave=False, mininterval=0.5 if sys.stderr.isatty() else 30)


class Clock:
    """Seconds worked: wall or CPU time, whichever is less, so that pauses do not count."""

    def __init__(self):
        self.last = time.monotonic(), time.process_time()

    def lap(self):
        now = time.monotonic(), time.process_time()
        wall, cpu = (a - b for a, b in zip(now, self.last, strict=True))
        self.last = now
        return min(wall, cpu)


# --- description of a run ---


def versions(*modules):
    return {m.__name__: m.__version__ for m in modules} | {"python": platform.python_version()}


def describe_run(script, args, task, data, device, direction, model_flags):
    """Content of config.json: the run's name, every setting, what else results depend on, and what determines the
    dynamics model (direction, data, model_flags); runs that agree in these may share the model."""
    source = {"d4rl": "", "file": f"__{Path(data.path).stem}"}.get(data.source, f"__{data.source}")
    try:
        git = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    except OSError:
        git = ""
    config = {"name": f"{task.slug}__{args.exp_name}__{args.seed}{source}", "script": Path(script).name}
    config |= {"obs_dim": data.obs.shape[1], "act_dim": data.act.shape[1]}
    settings = {k: str(v) if v in (math.inf, -math.inf) else v for k, v in asdict(args).items()}  # JSON has no inf
    config |= {"args": settings, "task": task.id, "dataset": data.facts(), "device": str(device)}
    config |= {"versions": versions(torch, np, gymnasium, mujoco), "git_commit": git or None}
    config |= {"command": [Path(script).name, *sys.argv[1:]], "wandb_id": uuid.uuid4().hex[:8]}
    decides = {"direction": direction, "data": data.sha256} | {k: getattr(args, k) for k in sorted(model_flags)}
    return json.loads(json.dumps(config | {"decides": {"dynamics": decides}}))


def differences(ours, theirs, bookkeeping):
    """Differences between two configs that affect results, in words."""
    if not isinstance(theirs, dict) or not isinstance(theirs.get("args"), dict):
        return ["settings, which cannot be read"]
    words = []
    for key in ("script", "device", "dataset"):
        if ours[key] != theirs.get(key):
            words.append("data" if key == "dataset" else f"{key} ({theirs.get(key)} there)")
    for name in sorted((ours["args"].keys() | theirs["args"].keys()) - bookkeeping):
        if ours["args"].get(name) != theirs["args"].get(name):
            words.append(f"--{name.replace('_', '-')} ({theirs['args'].get(name)} there)")
    return words


def summary(run):
    """Content of result.json; wall_time_s counts seconds worked."""
    config, args, evals = run.config, run.args, run.evals
    last = evals[-1] if evals else {}
    tail = [e["eval/normalized_score"] for e in evals[-10:] if e.get("eval/normalized_score") is not None]
    rate = (args.total_updates - run.begin[0]) / max(run.worked - run.begin[1], 1e-9)
    result = {"task": config["task"], "script": config["script"], "algorithm": args.exp_name, "seed": args.seed}
    result |= {"updates": args.total_updates, "normalized_score": last.get("eval/normalized_score")}
    result |= {"normalized_score_last_10": sum(tail) / len(tail) if tail else None}
    result |= {"return_mean": last.get("eval/return"), "return_std": last.get("eval/return_std")}
    result |= {"eval_episodes": args.eval_episodes, "wall_time_s": round(run.worked, 1)}
    result |= {"updates_per_s": round(rate, 2) or None}  # None: killed between the last update and this file
    result |= {k: config[k] for k in ("dataset", "device", "versions", "git_commit", "command")}
    return result | {"args": {k: v for k, v in config["args"].items() if k != "run_dir"}}


def score(evals):
    """The last score, for the progress bar."""
    last = {k: evals[-1][f"eval/{k}"] for k in ("normalized_score", "return")} if evals else {}
    return dict([(k, v) for k, v in last.items() if v is not None][:1])


# --- files ---


def write_file(path, content):
    """Write bytes or text atomically: neither a kill nor a power cut leaves half a file."""
    part = path.with_name(f"{path.name}.part")
    try:
        with open(part, "wb") as f:
            f.write(content.encode() if isinstance(content, str) else content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError as e:
        with contextlib.suppress(OSError):
            part.unlink()
        raise OSError(e.errno, e.strerror, str(path)) from None


def write_image(path, image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    write_file(path, buffer.getbuffer())


def file_sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def write_hdf5(path, arrays, facts, level=1, attributes=()):
    """Write arrays to an HDF5 file and `facts` to a .json beside it, last, so that its presence means "done"; facts
    named in `attributes` also become attributes of the HDF5 file. level: gzip's. Replaces files atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # In memory, as HDF5 crashes on a full disk. Its own driver gives the bytes of a file on disk, BytesIO others.
    with h5py.File(path, "w", driver="core", backing_store=False) as f:
        for k, v in arrays.items():
            f.create_dataset(k, data=v, compression="gzip", compression_opts=level, shuffle=True)
        for k in attributes:
            f.attrs[k] = facts[k]
        f.flush()
        content = f.id.get_file_image()
    facts = facts | {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    part = path.with_suffix(f".{os.getpid()}.part")  # two runs may generate the same data at once
    write_file(part, content)
    os.replace(part, path)
    write_file(path.with_suffix(".json"), json.dumps(facts, indent=1) + "\n")


def read_json(path):
    """The dict in a JSON file; UserError if it holds anything else."""
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict) or not content:
            raise ValueError("it holds no settings")
    except ValueError as e:
        raise UserError(f"{path} is damaged ({e}); restore it or start in another folder") from None
    return content


def read_checkpoint(path, keys=FACTS):
    """The dict in a checkpoint, on the CPU; UserError if it is damaged or not from these scripts."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not verify checksums
            if archive.testzip():
                raise ValueError("its checksums do not match")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not state.keys() >= set(keys):
            raise ValueError("not a checkpoint of these scripts")
    except Exception as e:  # a damaged file can raise anything
        if isinstance(e, OSError) and e.filename:
            raise
        why = str(e).split("\n")[0][:80]
        raise UserError(f"{path}: cannot be read ({why}); restore it or start in another folder") from None
    return state


def read_folder(folder, config, bookkeeping, total):
    """Checkpoints by phase, and whether the run in the folder is finished; UserError if it is a different run."""
    states = {p.stem: read_checkpoint(p) for p in sorted(folder.glob("*.pt"))}
    old, result = folder / "config.json", folder / "result.json"
    theirs = [state["config"] for state in states.values()]
    theirs += [read_json(old)] if old.exists() and (theirs or result.exists()) else []
    if differ := sorted({d for their in theirs for d in differences(config, their, bookkeeping)}):
        raise UserError(f"{folder} holds a run differing in {', '.join(differ)}; use another --run-dir or --exp-name")
    done = read_json(result) if result.exists() else {}
    if done.get("script", config["script"]) != config["script"]:
        raise UserError(f"{folder} holds a run of {done['script']}; use another --run-dir or --exp-name")
    if "agent" in states and states["agent"]["step"] > total:
        raise UserError(f"{folder} has {states['agent']['step']} updates already, more than the requested {total}")
    finished = done.get("updates") == total
    for phase in () if finished else config.get("decides", ()):  # refuse now, not when the phase starts
        if phase not in states and (other := config["args"].get(f"{phase}_from")):
            read_other_run(Path(other), phase, config)
    if done and not finished and "agent" not in states:
        raise UserError(f"{folder} is finished, but cannot be continued without its agent.pt")
    return states, finished


def read_other_run(path, phase, config):
    """A phase's checkpoint from another run, if everything that determines it is equal."""
    if not path.is_file():
        raise UserError(f"--{phase.replace('_', '-')}-from {path}: no such file; give the path of a {phase}.pt")
    state = read_checkpoint(path)
    ours, theirs = (c.get("decides", {}).get(phase, {}) for c in (config, state["config"]))
    if differ := [f"{k} ({theirs.get(k)}, here {v})" for k, v in ours.items() if theirs.get(k) != v]:
        raise UserError(f"--{phase.replace('_', '-')}-from {path} differs in {', '.join(differ)}")
    return state


def save(path, parts, facts):
    """Save state dicts by name, random states and facts. UserError if a weight is not finite; the old file stays."""

    def diverged(x):
        if isinstance(x, torch.Tensor):
            return x.is_floating_point() and not x.isfinite().all()
        return any(map(diverged, x.values() if isinstance(x, dict) else x if isinstance(x, list | tuple) else ()))

    state = {name: part.state_dict() for name, part in parts.items()}
    if names := [k for k, v in state.items() if diverged(v)]:
        keeps = "keeps its last good state" if path.exists() else "is not written"
        raise UserError(f"weights not finite at step {facts['step']}: {', '.join(names)}; {path} {keeps}", status=3)
    rng = [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])]
    buffer = io.BytesIO()
    torch.save(state | facts | {"rng": rng}, buffer)
    write_file(path, buffer.getbuffer())
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)  # returns free memory between used blocks, or long runs keep growing


def restore(state, parts, total, path):
    """Restore objects and random states from a checkpoint; returns its step."""
    whose = path if path.exists() else f"{path.name} of run {state['config']['name']}"  # else of the run that lent it
    if total is not None and state["step"] > total:
        raise UserError(f"{whose} has {state['step']} steps already, more than the requested {total}")
    try:
        for name, part in parts.items():
            part.load_state_dict(state[name])
    except (KeyError, ValueError, RuntimeError) as e:
        raise UserError(f"{whose}: does not fit this script ({str(e)[:80]}); use another --run-dir") from None
    torch.set_rng_state(state["rng"][0])
    if len(state["rng"]) > 1 and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["rng"][1])
    return state["step"]


def open_log(path, size, evals=()):
    """Open metrics.jsonl, lock it, and cut it to `size`, its bytes at the last checkpoint; later lines will be written
    again. A file shorter than that is replaced by the checkpoint's evaluations."""
    log = open(path, "a")
    with contextlib.suppress(ImportError):  # Windows has no fcntl
        import fcntl

        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path.parent}: another process is training in it") from None
        except OSError:  # no locks on this file system
            pass
    lost = size - log.tell()
    log.truncate(0 if lost > 0 else size)
    log.seek(0, os.SEEK_END)  # or tell() would still be the old end
    if lost > 0:
        print(f"note: {path} had lost {lost} bytes; evaluations restored from the checkpoint", file=sys.stderr)
        for row in evals:
            append(log, row)
    return log


def to_json(row, indent=None):
    """JSON of a dict; NaN and inf become null."""
    row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(row, indent=indent, allow_nan=False) + "\n"


def append(log, row):
    """Append a line to metrics.jsonl; an OSError names the file."""
    try:
        log.write(to_json(row))
        log.flush()
    except OSError as e:
        raise OSError(e.errno, e.strerror, log.name) from None


# --- Weights & Biases: its errors never stop a run ---


def start_wandb(args, config, folder):
    """The W&B run, or None. Without login or server it logs offline, for `wandb sync` later."""
    try:
        import wandb

        login = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False, verify=False) else "offline")
    except Exception as e:
        return print(f"W&B: {type(e).__name__}: {str(e)[:120]}; continuing without it", file=sys.stderr)
    task, algorithm = config["name"].split("__")[:2]
    about = dict(project=args.wandb_project_name, entity=args.wandb_entity, name=config["name"], id=config["wandb_id"])
    about |= dict(group=args.wandb_group or f"{task}__{algorithm}", config=config, resume="allow", dir=str(folder))
    about |= dict(tags=[config["task"], algorithm, config["dataset"]["source"]])
    for mode in dict.fromkeys((login, "offline")):
        try:
            run = wandb.init(mode=mode, settings=wandb.Settings(init_timeout=30), **about)
            run.define_metric("*", step_metric="update")
            if mode == "offline":
                print(f"W&B: offline; upload with: wandb sync {folder}/wandb/offline-run-*", file=sys.stderr)
            return run
        except Exception as e:
            print(f"W&B: {type(e).__name__}: {str(e)[:120]}", file=sys.stderr)
    return None


def to_wandb(run, call):
    """call(W&B run), if there is one."""
    if run.wandb:
        try:
            call(run.wandb)
        except Exception as e:
            print(f"W&B: {type(e).__name__}: {str(e)[:120]}; continuing without it", file=sys.stderr)
            run.wandb = None
