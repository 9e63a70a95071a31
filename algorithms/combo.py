"""COMBO: conservative offline model-based policy optimisation, CQL's pessimism on a mix of data and imagined transitions.

Paper: Yu et al. 2021, arXiv:2102.08363. There is no reference code; settings from yihaosun1124/OfflineRL-Kit (v2) and, as far as
they are known, from the paper (v0). Line numbers are those of the paper's Algorithm 1.

  model        p(s', r | s, a), ensemble of N Gaussians                          maximum likelihood on the data       Alg. 1, l. 1
  rollouts     s from the data, h steps of a ~ mu(.|s), (s', r) ~ p_i(.|s, a)    mu: pi or uniform on [-1, 1]^A        Alg. 1, l. 4
  Q functions  min_Q beta (E_rho[Q(s, a)] - E_data[Q(s, a)]) + 1/2 E_df[(Q - B Q_target)^2]                           Eq. 2; l. 5
               rho(a|s) = exp Q / sum_a exp Q; with rho fixed, E_rho[Q] has the gradient of log sum_a exp Q(s, a)       CQL Eq. 4
               data: real rows only; d_f: share f of real rows, 1 - f of imagined ones
  policy       max_pi E_(s in d_f)[min_j Q_j(s, a) - alpha log pi(a|s)], a ~ pi(.|s)                                   Eq. 3; l. 6

    python algorithms/combo.py --env hopper-medium-replay
    python algorithms/combo.py --env hopper-medium-replay --beta 0            # no conservative term
    python algorithms/combo.py --env hopper-medium-replay --model-ratio 0     # no model: CQL with COMBO's beta

Two presets. v2 (default): horizon and beta of OfflineRL-Kit, rollouts of the policy, rho on all states of the batch. v0: the
paper's, unverified where its appendix was not at hand: uniform rollouts and rho on imagined states for hopper, f = 0.8 on two
tasks of walker2d.

What public implementations do otherwise, and what it changes:
  1. Gradients flow through the log-sum-exp; unifloral stops them, so Q is raised on the data and lowered nowhere.
  2. It runs over all 3N sampled actions of a state. OfflineRL-Kit drops a reshape and sums over 3; its beta was
     chosen with that and is kept here, not tuned again.
  3. Rollouts stop where the termination rule says so (unifloral goes on), and the rule bounds hopper's states on both sides.
     OfflineRL-Kit also ends halfcheetah and walker2d where a state exceeds 100.
  4. The buffer holds the last 5 rollouts and nothing else; nothing unfilled can be sampled.
  5. No entropy in the backup, as in Eq. 2 (unifloral has it).

Differences from the paper, and from OfflineRL-Kit:
  6. TD errors are not halved (as in OfflineRL-Kit and d3rlpy, unlike Eq. 2), which makes beta half as strong.
  7. The policy sees all states of the batch, as l. 6 says, also where rho has imagined states only (Eq. 3: s of rho), the smaller
     of two Q values and an entropy term, as SAC does.
  8. The Q functions step before the policy, the temperature after it; in OfflineRL-Kit they come last. v2: the policy's rate
     decays with every update and over a full million, so that a run can be carried on; in OfflineRL-Kit with every 1 000, over
     the length of the run. A short run hardly decays: --policy-lr-decay sets the length.
  9. Rows without a recorded successor train no model. They stay in the learner's batches; OfflineRL-Kit drops them.
"""

import ctypes
import json
import math
import os
import platform
import random
import subprocess
import sys
import time
import uuid
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import gymnasium
import mujoco
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import nn
from tqdm import tqdm

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # after the script's own folder, where a copy has its utils.py
from utils import UserError, evaluate, load_dataset, make_env, normalized_score, parse_task


@dataclass
class Args:
    # --- experiment ---
    env: Annotated[str, tyro.conf.arg(aliases=["--env-id"])] = "hopper-medium-replay"  # D4RL task (version optional) or Minari id
    exp_name: str | None = None  # None: combo; combo_cql without imagined data; combo_beta0; with preset v0 ..._v0
    preset: Literal["v2", "v0"] = "v2"  # settings below that are None: OfflineRL-Kit's (v2) or the paper's (v0)
    seed: int = 0
    total_updates: int = 1_000_000  # gradient updates of the learner; a larger number later carries a finished run on
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    num_threads: int | None = None  # threads on the CPU; None: all cores
    compile: bool = False  # torch.compile the losses; on a GPU with CUDA graphs
    bf16: bool = False  # bfloat16 for Q of the conservative term's 3N actions, the bulk of an update; the rest stays float32
    run_dir: str = "runs"  # parent of the run's folder
    checkpoint_every: int = 10_000  # updates; dynamics training writes one an epoch

    # --- logging ---
    track: bool = False  # log to Weights & Biases as well
    wandb_project_name: str = "rewind"
    wandb_entity: str | None = None
    wandb_group: str | None = None  # None: task and algorithm
    log_every: int = 1_000  # updates

    # --- data and evaluation ---
    dataset: str = "auto"  # auto, d4rl, bundled, generated, a Minari id, or the path of an HDF5 file in D4RL layout
    eval_every: int = 5_000  # updates
    eval_episodes: int = 10  # per evaluation, with greedy actions; 0: never touch the simulator

    # --- dynamics ---
    ensemble_size: int = 7  # members of the model
    num_elites: int = 5  # members with the lowest holdout error; only these imagine
    dynamics_hidden: int = 200  # width of the 4 hidden layers
    dynamics_bf16: bool = False  # bfloat16 in the model's hidden layers; their weights, first and last layer and loss stay float32
    dynamics_lr: float = 1e-3
    dynamics_batch_size: int = 256
    dynamics_weight_decay: tuple[float, ...] = (2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4)  # L2 on the weights, layer by layer
    dynamics_max_epochs: int | None = None  # None: until the holdout error stops falling, as the reference code
    dynamics_from: str | None = None  # folder of another run whose model is taken: same data, seed and settings, so the same model
    dynamics_patience: int = 5  # epochs in which no member improves by 1 % on its best; training stops on the next one
    holdout_ratio: float = 0.2  # share of the rows held out
    holdout_max: int = 1_000  # upper limit of held-out rows

    # --- rollout (None: the task's value, SETTINGS below) ---
    horizon: int | None = None  # imagined steps per start state (h); None: by task
    model_ratio: float | None = None  # share of imagined rows in a batch (eta = 1 - real_ratio); 0: the base learner; None: by task
    rollout_every: int = 1_000  # updates from one rollout to the next
    rollout_starts: int = 50_000  # start states per rollout
    rollouts_kept: int = 5  # rollouts in the buffer, the oldest goes first
    rollout_policy: Literal["policy", "uniform"] | None = None  # mu, which actions are imagined; None: by task

    # --- learner ---
    batch_size: int = 256  # real and imagined rows together
    gamma: float = 0.99  # discount
    tau: float = 0.005  # rate of the target networks
    hidden: tuple[int, ...] = (256, 256, 256)  # widths of the hidden layers of policy and Q functions
    qf_lr: float | None = None  # None: 3e-4; 1e-4 for walker2d in v0
    policy_lr: float | None = None  # policy and temperature; None: 1e-4; 1e-5 for walker2d in v0
    policy_lr_decay: int | None = None  # updates in which a cosine takes the policy's rate to 0, 0: never; None: as the preset
    target_entropy: float | None = None  # None: minus the number of action dimensions
    beta: float | None = None  # weight of the conservative term; None: by task
    rho_states: Literal["mix", "model"] | None = None  # where Q is pushed down: all states of the batch, or imagined ones; None: by task
    cql_samples: int = 10  # actions per source (N): uniform, pi(.|s), pi(.|s')
    cql_temperature: float = 1.0


# Horizon h, beta, mu, states of rho, eta = 1 - f. v0: the paper, beta and rates as d3rlpy's reproduction has them. v2:
# OfflineRL-Kit, run_example/run_combo.py. "ours" is in neither. The longest key that the task begins with counts.
SETTINGS = {
    "v0": {
        "halfcheetah-random": (5, 0.5, "policy", "mix", 0.5),
        "hopper-random": (5, 1.0, "uniform", "model", 0.5),
        "walker2d-random": (1, 0.5, "policy", "mix", 0.5),
        "halfcheetah-medium": (5, 0.5, "policy", "mix", 0.5),
        "hopper-medium": (5, 5.0, "uniform", "model", 0.5),
        "walker2d-medium": (1, 5.0, "policy", "mix", 0.2),
        "halfcheetah-medium-replay": (5, 0.5, "policy", "mix", 0.5),
        "hopper-medium-replay": (5, 1.0, "uniform", "model", 0.5),
        "walker2d-medium-replay": (1, 0.5, "policy", "mix", 0.5),
        "halfcheetah-medium-expert": (5, 0.5, "policy", "mix", 0.5),
        "hopper-medium-expert": (5, 5.0, "uniform", "model", 0.5),
        "walker2d-medium-expert": (1, 5.0, "policy", "mix", 0.2),
        "halfcheetah-jump": (5, 0.5, "policy", "mix", 0.5),  # ours, as are those of any other task
        "ant-angle": (5, 0.5, "policy", "mix", 0.5),
        "": (1, 1.0, "policy", "mix", 0.5),
    },
    "v2": {
        "halfcheetah-random": (5, 0.5, "policy", "mix", 0.5),  # random: beta of v0, which OfflineRL-Kit does not list
        "hopper-random": (5, 1.0, "policy", "mix", 0.5),
        "walker2d-random": (1, 0.5, "policy", "mix", 0.5),
        "halfcheetah-medium": (5, 0.5, "policy", "mix", 0.5),
        "hopper-medium": (5, 5.0, "policy", "mix", 0.5),
        "walker2d-medium": (1, 5.0, "policy", "mix", 0.5),
        "halfcheetah-medium-replay": (5, 0.5, "policy", "mix", 0.5),
        "hopper-medium-replay": (5, 0.5, "policy", "mix", 0.5),
        "walker2d-medium-replay": (1, 0.5, "policy", "mix", 0.5),
        "halfcheetah-medium-expert": (5, 5.0, "policy", "mix", 0.5),
        "hopper-medium-expert": (5, 5.0, "policy", "mix", 0.5),
        "walker2d-medium-expert": (1, 5.0, "policy", "mix", 0.5),
        "halfcheetah-jump": (5, 0.5, "policy", "mix", 0.5),  # ours, as are those of any other task
        "ant-angle": (5, 0.5, "policy", "mix", 0.5),
        "": (1, 1.0, "policy", "mix", 0.5),
    },
}
# Flags that change no update (the number of threads only its rounding): a run may be carried on with other values of them.
BOOKKEEPING = {"run_dir", "checkpoint_every", "log_every", "num_threads", "total_updates", "track", "device", "dynamics_from"}
BOOKKEEPING |= {"wandb_project_name", "wandb_entity", "wandb_group"}
BOOKKEEPING |= {"dataset"}  # their contents count, not how they were asked for
ADDED = {"bf16", "dynamics_bf16"}  # flags younger than the first runs: one that was begun without them goes on with the default
MAY_BE_ZERO = {"seed", "model_ratio", "eval_episodes", "gamma", "beta", "policy_lr_decay", "dynamics_weight_decay"}
MAY_BE_ZERO |= {"dynamics_patience"}


def resolve(args, task):
    """The arguments with the settings of preset and task where the user left None; UserError for what cannot work."""
    table = SETTINGS[args.preset]
    row = table[max((k for k in table if f"{task.domain}-{task.kind}".startswith(k)), key=len)]
    tuned = dict(zip(("horizon", "beta", "rollout_policy", "rho_states", "model_ratio"), row, strict=True))
    slow = args.preset == "v0" and task.domain == "walker2d"
    tuned |= {"qf_lr": 1e-4 if slow else 3e-4, "policy_lr": 1e-5 if slow else 1e-4}
    tuned |= {"policy_lr_decay": 1_000_000 if args.preset == "v2" else 0}
    args = replace(args, **{k: v for k, v in tuned.items() if getattr(args, k) is None})
    for name, value in asdict(args).items():
        for v in value if isinstance(value, tuple) else (value,):
            flag = f"--{name.replace('_', '-')} {v}"
            if type(v) is float and not math.isfinite(v):
                raise UserError(f"{flag}: must be a finite number")
            if type(v) in (int, float) and name != "target_entropy":
                if v < 0 or (v == 0 and name not in MAY_BE_ZERO):
                    raise UserError(f"{flag}: must be {'at least 0' if name in MAY_BE_ZERO else 'positive'}")
                if (v > 1 and name in ("gamma", "tau", "model_ratio")) or (v >= 1 and name == "holdout_ratio"):
                    raise UserError(f"{flag}: must be {'below' if name == 'holdout_ratio' else 'at most'} 1")
    if 0 < args.policy_lr_decay < args.total_updates:
        raise UserError(f"--total-updates {args.total_updates}: the policy stands still after --policy-lr-decay {args.policy_lr_decay}")
    if args.num_elites > args.ensemble_size or len(args.dynamics_weight_decay) != 5:
        raise UserError("--num-elites must not exceed --ensemble-size, and --dynamics-weight-decay needs 5 values")
    if args.model_ratio > 0 and int((1 - args.model_ratio) * args.batch_size + 1e-6) == args.batch_size:
        raise UserError(f"--model-ratio {args.model_ratio}: not one row of a batch of {args.batch_size}; 0 switches the model off")
    if int((1 - args.model_ratio) * args.batch_size + 1e-6) == 0:
        raise UserError(f"--model-ratio {args.model_ratio}: not one real row in a batch of {args.batch_size}")
    name = "combo_cql" if args.model_ratio == 0 else "combo" if args.beta > 0 else "combo_beta0"
    name += "" if args.preset == "v2" else "_v0"
    return replace(args, exp_name=args.exp_name or name, num_threads=args.num_threads or os.cpu_count())


# --- run folder ---


class Run:
    """Config, metrics, checkpoints and result of one run, in <run-dir>/<task>__<algorithm>__<seed>[__<data source>]."""

    def __init__(self, args, task, data, device):
        """Make the folder or take up the run in it; `finished` says that there is nothing left to do."""
        self.args, self.task, self.data, self.began = args, task, data, time.time()
        source = {"d4rl": "", "file": f"__{Path(data.path).stem}"}.get(data.source, f"__{data.source}")
        self.folder = Path(args.run_dir) / f"{task.slug}__{args.exp_name}__{args.seed}{source}"
        modules = {m.__name__: m.__version__ for m in (torch, np, gymnasium, mujoco)} | {"python": platform.python_version()}
        git = subprocess.getoutput(f"git -C '{Path(__file__).parent}' rev-parse HEAD")
        config = {"args": asdict(args), "task": task.id, "dataset": data.facts(), "device": str(device), "versions": modules}
        config |= {"command": [Path(__file__).name, *sys.argv[1:]], "git_commit": git if len(git) == 40 else None}
        self.config = json.loads(json.dumps(config)) | {"wandb_id": uuid.uuid4().hex[:8]}
        self.state, self.evals, self.elapsed, self.wandb, self.finished = {}, [], 0.0, None, False
        result = self.folder / "result.json"
        if (self.folder / "checkpoint.pt").exists() or result.exists():  # where nothing is saved yet, settings may change
            old = json.loads((self.folder / "config.json").read_text())
            if (script := old["command"][0]) != self.config["command"][0]:
                raise UserError(f"{self.folder} holds a run of {script}; give another --run-dir or --exp-name")
            self.config["wandb_id"] = old["wandb_id"]  # a resumed run continues its curve
            now, then = ({k: v for k, v in c["args"].items() if k not in BOOKKEEPING} for c in (self.config, old))
            now["device"], then["device"] = self.config["device"], old["device"]
            then = {k: getattr(Args, k) for k in ADDED} | then
            differ = [f"--{k.replace('_', '-')} ({then.get(k)} there)" for k in sorted(now | then) if now.get(k) != then.get(k)]
            facts = [k for k, v in self.config["dataset"].items() if v != old["dataset"].get(k)]
            differ += sorted({f"{k if k in data.more_facts else 'data'} file" for k in facts})  # also of a reference, of an expert
            if differ:
                raise UserError(f"{self.folder} holds a run with another {', '.join(differ)}; give another --run-dir or --exp-name")
        if (self.folder / "checkpoint.pt").exists():
            self.state = load_checkpoint(self.folder / "checkpoint.pt")
            self.evals, self.elapsed = self.state["evals"], self.state["elapsed"]
            if self.state["phase"] == "policy" and self.state["step"] > args.total_updates:
                raise UserError(f"--total-updates {args.total_updates}: {self.folder} has {self.state['step']} updates already")
        if result.exists():
            self.finished = json.loads(result.read_text())["updates"] == args.total_updates
            if self.finished:
                return
            result.unlink()  # more updates are asked for
        at = f"resumed at step {self.state['step']} of {self.state['phase']}" if self.state else "new run"
        print(f"{self.folder}: {at}, {len(data)} transitions of {data.source} data, on {device}", file=sys.stderr)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.metrics = open(self.folder / "metrics.jsonl", "a")
        try:
            import fcntl

            fcntl.flock(self.metrics, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held as long as the file is open
        except BlockingIOError:
            raise UserError(f"{self.folder}: another process is training in it") from None
        except (ImportError, OSError):  # Windows, or a file system without locks
            pass
        self.write("config.json", lambda f: f.write_text(json.dumps(self.config, indent=1) + "\n"))
        self.metrics.truncate(self.state.get("metrics_bytes", 0))  # what came after the checkpoint will come again
        if args.track:
            self.begin_wandb()

    def begin_wandb(self):
        for mode in (os.environ.get("WANDB_MODE"), "offline"):  # no login or no server: offline, for `wandb sync` later
            try:
                import wandb

                self.wandb = wandb.init(
                    project=self.args.wandb_project_name, entity=self.args.wandb_entity, name=self.folder.name,
                    group=self.args.wandb_group or f"{self.task.slug}__{self.args.exp_name}", id=self.config["wandb_id"],
                    tags=[self.task.id, self.args.exp_name, self.data.source], config=self.config, resume="allow", mode=mode,
                    dir=str(self.folder), settings=wandb.Settings(init_timeout=30),
                )  # fmt: skip
                return self.wandb.define_metric("*", step_metric="update")
            except Exception as e:  # whatever it is, a run is not stopped by its logger
                print(f"W&B: {type(e).__name__}: {str(e)[:120]}", file=sys.stderr)

    def log(self, update, metrics):
        """One line of metrics.jsonl; tensors become floats here and nowhere else."""
        row = {"update": update} | {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in metrics.items()}
        if bad := [k for k, v in row.items() if k.startswith("losses/") and not math.isfinite(v)]:
            raise UserError(f"{', '.join(bad)} not finite at update {update}; {self.folder} keeps its last good checkpoint", status=3)
        self.metrics.write(json.dumps(row) + "\n")
        self.metrics.flush()
        self.to_wandb(lambda run: run.log(row))

    def to_wandb(self, call):
        try:
            if self.wandb:
                call(self.wandb)
        except Exception as e:
            print(f"W&B: {type(e).__name__}: {str(e)[:120]}; going on without it", file=sys.stderr)
            self.wandb = None

    def write(self, name, write):
        part = self.folder / f"{name}.part"
        write(part)
        os.replace(part, self.folder / name)  # a killed run never leaves half a file under its name
        if name.endswith(".png"):
            self.to_wandb(lambda run: run.log({f"figures/{name[:-4]}": sys.modules["wandb"].Image(str(self.folder / name))}))

    def save(self, phase, step, **parts):
        """Checkpoint. What earlier phases left in it stays, unless it is given again; None removes it."""
        rng = [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])
        self.state |= parts | {"phase": phase, "step": step, "rng": rng, "evals": self.evals}
        self.state |= {"metrics_bytes": self.metrics.tell(), "elapsed": self.elapsed + time.time() - self.began}
        self.state = {k: v for k, v in self.state.items() if v is not None}
        self.write("checkpoint.pt", lambda f: torch.save(self.state, f))
        if platform.libc_ver()[0] == "glibc":
            ctypes.CDLL(None).malloc_trim(0)  # gives back what lies free between blocks in use, or long runs creep up

    def restore_rng(self):
        torch.set_rng_state(self.state["rng"][0])
        if len(self.state["rng"]) > 1 and torch.cuda.is_available():
            torch.cuda.set_rng_state(self.state["rng"][1])

    def evaluate(self, update, envs, act):
        """Deterministic episodes, seeded apart from training and from other seeds; the score, or without a reference the return."""
        self.seen, rewards = [], []
        returns, lengths = evaluate(envs, act, seed=1000 * self.args.seed + 100, trajectories=self.seen, rewards=rewards)
        self.draw("execution", self.seen)
        e = {"return": returns.mean().item(), "return_std": returns.std().item(), "length": lengths.mean().item()}
        e["normalized_score"] = normalized_score(self.task, e["return"])
        # as far as a learner looks ahead, to compare with Q values: policies of equal discounted return may differ a lot in score
        e["discounted_return"] = float(np.mean([r @ self.args.gamma ** np.arange(len(r)) for r in rewards]))
        self.evals.append({"update": update} | e)
        self.log(update, {f"eval/{k}": v for k, v in e.items()})
        return e["return"] if e["normalized_score"] is None else e["normalized_score"]

    def draw(self, name, trajectories):
        """On a maze, the top view of some (T, 4) trajectories as <name>.png."""
        if self.task.domain == "maze2d":
            from maze2d_env import draw_trajectories

            self.write(f"{name}.png", lambda f: draw_trajectories(self.task.kind.split("-")[0], trajectories[:100], f))

    def finish(self, updates, sps, **more):
        last = self.evals[-1] if self.evals else dict.fromkeys(("return", "return_std", "normalized_score"))
        tail = [e["normalized_score"] for e in self.evals[-10:] if e["normalized_score"] is not None]
        result = {"task": self.task.id, "algorithm": self.args.exp_name, "seed": self.args.seed, "updates": updates}
        result |= {"normalized_score": last["normalized_score"], "normalized_score_last_10": sum(tail) / len(tail) if tail else None}
        result |= {"return_mean": last["return"], "return_std": last["return_std"], "eval_episodes": self.args.eval_episodes}
        result |= {"wall_time_s": round(self.elapsed + time.time() - self.began, 1), "updates_per_s": round(sps, 2)}
        result |= more | {k: self.config[k] for k in ("dataset", "device", "versions", "git_commit", "command")}
        self.write("result.json", lambda f: f.write_text(json.dumps(result, indent=1) + "\n"))
        columns = list(self.evals[-1]) if self.evals else []
        rows = [[e.get(k) for k in columns] for e in self.evals]  # a run may have begun before a column existed
        self.to_wandb(lambda run: run.log({"evaluations": sys.modules["wandb"].Table(columns, rows)}))
        self.to_wandb(lambda run: (run.summary.update(result), run.finish()))
        score = [f"{name.replace('_', ' ')} {last[name]:.1f}" for name in ("normalized_score", "return") if last[name] is not None]
        score += [f"{name.replace('_', ' ')} {value:.1f}" for name, value in more.items()]
        print(f"{self.folder}: {', '.join(score) or 'not evaluated'}")


def load_checkpoint(path):
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # whatever the bytes of a damaged file lead to
        raise UserError(f"{path}: cannot be read ({type(e).__name__}: {str(e)[:80]})") from None


def pick_device(name):
    have = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name != "auto" and not have[name]:
        raise UserError(f"--device {name}: there is none here; use --device auto")
    return torch.device(name if name != "auto" else "cuda" if have["cuda"] else "cpu")


def keep_freed_memory():
    """glibc returns freed blocks to the system and faults them in again at the next update, up to a third of its time on a
    CPU; and while it adjusts its thresholds itself, long runs grow by gigabytes. Fixed thresholds (and a trim at every
    checkpoint) cure both."""
    if platform.libc_ver()[0] == "glibc":
        for option, value in ((-3, 32 << 20), (-1, 2**31 - 1), (-2, 64 << 20)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD
            ctypes.CDLL(None).mallopt(option, value)


def descend(opt, loss, inputs=None):
    """One gradient step."""
    opt.zero_grad()
    loss.backward(inputs=inputs)
    opt.step()


def progress(total, desc, unit, initial=0):
    return tqdm(total=total, initial=initial, desc=desc, unit=unit, mininterval=0.5 if sys.stderr.isatty() else 30)


# --- networks ---


class Float32Linear(nn.Linear):
    """In float32 under autocast, too. bfloat16 has 8 bits: at 9 m its steps are longer than a step of the ball, at Q = 100 they
    are half a reward."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


def mlp(*sizes):
    linear = [nn.Linear if 0 < i < len(sizes) - 2 else Float32Linear for i in range(len(sizes) - 1)]  # first and last in full
    layers = [f(n, m) for f, n, m in zip(linear, sizes, sizes[1:], strict=False)]
    return nn.Sequential(*[x for layer in layers for x in (layer, nn.ReLU(inplace=True))][:-1])


def squash(mean, log_std, noise):
    """Tanh of a Gaussian sample, and its log-density: (..., A) -> (..., A), (...)"""
    pre_tanh = mean + log_std.exp() * noise
    log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    log_prob = log_prob - 2 * (math.log(2) - pre_tanh - F.softplus(-2 * pre_tanh))  # - log(1 - tanh(u)^2), never log 0
    return pre_tanh.tanh(), log_prob.sum(-1)


class Policy(nn.Module):
    """pi(a|s): tanh-squashed Gaussian, log standard deviation clamped to [-5, 2]."""

    def __init__(self, obs_dim, act_dim, hidden):
        super().__init__()
        self.net = mlp(obs_dim, *hidden, 2 * act_dim)

    def forward(self, obs):
        """obs (B, O) -> mean and log standard deviation before the tanh, (B, A) each"""
        mean, log_std = self.net(obs).chunk(2, -1)
        return mean, log_std.clamp(-5, 2)


class QFunctions(nn.Module):
    """Q_1(s,a) and Q_2(s,a)."""

    def __init__(self, obs_dim, act_dim, hidden):
        super().__init__()
        self.q1 = mlp(obs_dim + act_dim, *hidden, 1)
        self.q2 = mlp(obs_dim + act_dim, *hidden, 1)

    def forward(self, obs, act):
        """obs (..., O), act (..., A) -> (2, ...)"""
        x = torch.cat([obs, act], -1)
        rows = x.flatten(0, -2)  # a matrix: on views of more dimensions autograd would copy at every in-place ReLU
        return torch.stack([self.q1(rows), self.q2(rows)]).view(2, *x.shape[:-1])


# --- dynamics model ---


class Dynamics(nn.Module):
    """E Gaussians over reward and change of state, each a network of its own, one tensor operation per layer; sizes, bounds and
    weight decays from tianheyu927/mopo, mopo/models. A forward model is given s and predicts s', p(s', r | s, a); a reverse
    model is given s' and predicts s, p(s, r | s', a): `cond` and `pred` stand for the two.
    """

    def __init__(self, obs_dim, act_dim, args):
        super().__init__()
        self.args = args
        sizes = [obs_dim + act_dim] + 4 * [args.dynamics_hidden] + [2 * (obs_dim + 1)]
        self.weight, self.bias = nn.ParameterList(), nn.ParameterList()
        for n, m in zip(sizes, sizes[1:], strict=False):
            w, std = torch.empty(args.ensemble_size, n, m), 0.5 / n**0.5
            self.weight.append(nn.init.trunc_normal_(w, std=std, a=-2 * std, b=2 * std))
            self.bias.append(torch.zeros(args.ensemble_size, 1, m))
        self.max_logvar = nn.Parameter(torch.full((obs_dim + 1,), 0.5))
        self.min_logvar = nn.Parameter(torch.full((obs_dim + 1,), -10.0))
        self.register_buffer("mean", torch.zeros(obs_dim + act_dim))
        self.register_buffer("std", torch.ones(obs_dim + act_dim))
        self.register_buffer("elites", torch.arange(args.num_elites))

    def inputs(self, cond, act):
        return (torch.cat([cond, act], -1) - self.mean) / self.std

    def forward(self, x, members=slice(None)):
        """x (E, B, O+A), standardised -> mean and log-variance of (r, pred - cond), (E, B, 1+O) each"""
        last = len(self.weight) - 1
        for i, (w, b) in enumerate(zip(self.weight, self.bias, strict=True)):
            layer = (b[members], x, w[members])
            if self.args.dynamics_bf16:
                layer = [t.to(torch.bfloat16 if 0 < i < last else torch.float32) for t in layer]
            x = torch.baddbmm(*layer)
            x = F.silu(x) if i < last else x
        mean, logvar = x.chunk(2, -1)
        logvar = self.max_logvar - F.softplus(self.max_logvar - logvar)
        return mean, self.min_logvar + F.softplus(logvar - self.min_logvar)

    def loss(self, x, target):
        """Gaussian negative log-likelihood (doubled, no constant), mean of rows and outputs, summed over members; a pull on the bounds."""
        mean, logvar = self(x)
        nll = ((mean - target).square() * (-logvar).exp() + logvar).mean((1, 2)).sum()
        return nll + 0.01 * (self.max_logvar.sum() - self.min_logvar.sum())

    @torch.no_grad()
    def sample(self, cond, act):
        """pred and r, each row from an elite of its own: (B, O), (B, A) -> (B, O), (B,)"""
        x = self.inputs(cond, act)
        chosen = self.elites[torch.randint(len(self.elites), (len(x),), device=x.device)]
        out = torch.randn(len(x), cond.shape[1] + 1, device=x.device)
        for e in self.elites.tolist():
            rows = (chosen == e).nonzero().squeeze(1)
            mean, logvar = self(x[rows].unsqueeze(0), slice(e, e + 1))
            out[rows] = mean[0] + (0.5 * logvar[0]).exp() * out[rows]
        return cond + out[:, 1:], out[:, 0]

    def optimizer(self):
        """Adam's own weight decay adds wd W to the gradient: that of the loss term wd/2 |W|^2 in mopo."""
        groups = [{"params": [w], "weight_decay": wd} for w, wd in zip(self.weight, self.args.dynamics_weight_decay, strict=True)]
        groups.append({"params": [*self.bias, self.max_logvar, self.min_logvar]})
        return torch.optim.Adam(groups, lr=self.args.dynamics_lr, fused=True)


def train_dynamics(dynamics, cond, act, rew, pred, args, run):
    """Maximum likelihood until the holdout error of every member has stopped falling."""
    device, E = cond.device, args.ensemble_size
    # Split and bootstraps come from a generator of their own: a resumed run draws the same ones again.
    split = torch.Generator().manual_seed(args.seed)
    order = torch.randperm(len(act), generator=split).to(device)
    num_holdout = max(1, min(int(args.holdout_ratio * len(act)), args.holdout_max))
    holdout, train = order[:num_holdout], order[num_holdout:]
    bootstrap = torch.randint(len(train), (E, len(train)), generator=split) if E > 1 else torch.arange(len(train))[None]
    bootstrap = bootstrap.to(device)
    x, y = torch.cat([cond, act], -1), torch.cat([rew[:, None], pred - cond], -1)
    mean, std = x[train].mean(0), x[train].std(0, unbiased=False)
    dynamics.mean.copy_(mean)
    dynamics.std.copy_(torch.where(std < 1e-12, 1.0, std))
    x = dynamics.inputs(cond, act)
    layers, opt = [*dynamics.weight, *dynamics.bias], dynamics.optimizer()
    snapshot, best = [p.detach().clone() for p in layers], torch.full((E,), math.inf, device=device)
    epoch = stale = 0
    if "dynamics_training" in run.state:
        saved = run.state["dynamics_training"]
        dynamics.load_state_dict(run.state["dynamics"])
        opt.load_state_dict(saved["opt"])
        snapshot, best = [p.to(device) for p in saved["snapshot"]], saved["best"].to(device)
        epoch, stale = saved["epoch"], saved["stale"]
        run.restore_rng()

    @torch.no_grad()
    def holdout_mse():
        return (dynamics(x[holdout].expand(E, -1, -1))[0] - y[holdout]).square().mean((1, 2))  # (E,)

    loss_fn = torch.compile(dynamics.loss) if args.compile else dynamics.loss
    bar = progress(args.dynamics_max_epochs, "dynamics", "epoch", epoch)
    while stale <= args.dynamics_patience and epoch < (args.dynamics_max_epochs or math.inf):
        shuffle = torch.stack([torch.randperm(len(train), device=device) for _ in range(E)])
        rows = train[bootstrap.gather(1, shuffle)]  # (E, N): every member sees its own bootstrap, in a new order
        for idx in rows.split(args.dynamics_batch_size, 1):  # (E, B)
            loss = loss_fn(x[idx], y[idx])
            descend(opt, loss)
        mse = holdout_mse()
        improved = mse < 0.99 * best  # every member keeps the weights of its own best epoch
        best = torch.where(improved, mse, best)
        for kept, p in zip(snapshot, layers, strict=True):
            kept[improved] = p.detach()[improved]
        epoch, stale = epoch + 1, 0 if improved.any() else stale + 1
        run.log(0, {"model/epoch": epoch, "losses/dynamics": loss.detach(), "model/holdout_mse": mse.mean(), "model/best_mse": best.mean()})
        training = {"opt": opt.state_dict(), "epoch": epoch, "stale": stale, "best": best, "snapshot": snapshot}
        run.save("dynamics", epoch, dynamics=dynamics.state_dict(), dynamics_training=training)
        bar.set_postfix(holdout_mse=f"{mse.mean():.4g}", best=f"{best.mean():.4g}")
        bar.update()
    bar.close()
    with torch.no_grad():
        torch._foreach_copy_(layers, snapshot)  # the bounds of the log-variance stay as they are
    mse = holdout_mse()
    dynamics.elites.copy_(mse.argsort()[: args.num_elites])
    explained = 1 - mse[dynamics.elites].mean() / y[holdout].var(0, unbiased=False).mean()
    with torch.no_grad():  # the error that the model expects of itself: far above its error, it imagines noise
        expected = dynamics(x[holdout].expand(E, -1, -1))[1][dynamics.elites].exp().mean()
    fit = {"elite_mse": mse[dynamics.elites].mean(), "elite_expected_mse": expected, "explained_variance": explained}
    run.log(0, {"model/epochs": epoch} | {f"model/{k}": v for k, v in fit.items()})
    error = f"holdout MSE {fit['elite_mse']:.4g}, {100 * explained:.1f} % of the variance explained"
    print(f"dynamics: {epoch} epochs, elites {dynamics.elites.tolist()}, {error}", file=sys.stderr)


def model_key(direction, args, data):
    """Everything that decides a trained model."""
    settings = {k: v for k, v in asdict(args).items() if k.startswith(("dynamics_", "ensemble_", "num_elites", "holdout_", "seed"))}
    settings.pop("dynamics_from")
    return json.loads(json.dumps(settings | {"direction": direction, "data": data.sha256}))


def model_of_another_run(args, key):
    """State of the model in the folder --dynamics-from: training it here again would take hours and, on the
    same device with as many threads, give the same bits."""
    path = Path(args.dynamics_from) / "checkpoint.pt"
    if not path.is_file():
        raise UserError(f"--dynamics-from {args.dynamics_from}: no checkpoint.pt there (a run that has its model goes on without the flag)")
    state = load_checkpoint(path)
    if "model_key" not in state:
        raise UserError(f"--dynamics-from {args.dynamics_from}: its model is not trained to the end")
    theirs = {k: getattr(Args, k) for k in ADDED if k in key} | state["model_key"]
    if differ := [f"{k} ({theirs.get(k)}, here {key[k]})" for k in sorted(key) if key[k] != theirs.get(k)]:
        raise UserError(f"--dynamics-from {args.dynamics_from}: its model has another {', '.join(differ)}")
    return state["dynamics"]


@torch.no_grad()
def model_error(dynamics, act, trajectories, horizon):
    """Root mean squared error of the elites' mean prediction on episodes of the real environment, after one step and after
    `horizon` steps that follow the recorded actions, over all state dimensions, each in its standard deviation over the data.

    act: obs (B, O) -> the actions (B, A) that made the episodes; trajectories: list of (T+1, O) arrays
    """
    device, errors = dynamics.mean.device, {}
    episodes = [torch.as_tensor(t, dtype=torch.float32) for t in trajectories]
    acts = [act(e[:-1]).to(device) for e in episodes]  # the policy is deterministic: the same actions again
    for steps in sorted({1, horizon}):
        known = [i for i, e in enumerate(episodes) if len(e) > steps]
        if known:
            obs = torch.cat([episodes[i][:-steps] for i in known]).to(device)
            for k in range(steps):
                a = torch.cat([acts[i][k : len(acts[i]) - steps + 1 + k] for i in known])
                mean = dynamics(dynamics.inputs(obs, a).expand(len(dynamics.elites), -1, -1), dynamics.elites)[0]
                obs = obs + mean.mean(0)[:, 1:]
            truth = torch.cat([episodes[i][steps:] for i in known]).to(device)
            errors[f"model/true_error_{steps}"] = ((obs - truth) / dynamics.std[: obs.shape[1]]).square().mean().sqrt()
    return errors


# --- rollout ---


def termination_fn(task, data):
    """(obs, act, next_obs) -> (B,) bool, has the MDP ended with this transition? The rules of Gymnasium's v4 robots; with the
    signature that mopo's have, although none of them looks at more than next_obs."""
    if task.domain == "antmaze":  # rewarded positions lie within 0.5 of the goal: their middle is the goal, no simulator needed
        reached = torch.where(data.has_next[:, None], data.next_obs, data.obs)[data.terminated > 0, :2]
        if not len(reached):
            raise UserError("--dataset: no row of it ends at the goal, so where imagined episodes end is unknown")
        goal = (reached.amax(0) + reached.amin(0)) / 2

    def terminates(obs, act, next_obs):
        height, angle, finite = next_obs[:, 0], next_obs[:, 1], next_obs.isfinite().all(-1)
        if task.domain == "hopper":
            return ~(finite & (next_obs[:, 1:].abs() < 100).all(-1) & (height > 0.7) & (angle.abs() < 0.2))
        if task.domain == "walker2d":
            return ~((height > 0.8) & (height < 2.0) & (angle.abs() < 1.0))
        if task.domain == "ant":
            return ~(finite & (height >= 0.2) & (height <= 1.0))
        if task.domain == "antmaze":
            return (next_obs[:, :2] - goal.to(next_obs.device)).norm(dim=-1) <= 0.5
        return torch.zeros_like(finite)  # halfcheetah and maze2d never end

    return terminates


def pack(obs, act, rew, next_obs, terminated):
    """Transitions as rows of one matrix, so that a batch is one index operation: (B, 2 O + A + 2)"""
    return torch.cat([obs, act, rew[:, None], next_obs, terminated[:, None].float()], -1)


def unpack(rows, obs_dim, act_dim):
    obs, act, rew, next_obs, terminated = rows.split([obs_dim, act_dim, 1, obs_dim, 1], -1)
    return obs, act, rew.squeeze(-1), next_obs, terminated.squeeze(-1)


@torch.no_grad()
def imagine(starts, dynamics, policy, terminates, args):
    """A rollout of `horizon` steps from `rollout_starts` rows of `starts` (N, O): its M transitions (M, 2 O + A + 2), fewer than
    horizon x rollout_starts where some end early, and what to log
    (COMBO Alg. 1, l. 4)."""
    obs = starts[torch.randint(len(starts), (args.rollout_starts,), device=starts.device)]
    rows, alive = [], []
    for _ in range(args.horizon):
        mean, log_std = policy(obs)
        act, _ = squash(mean, log_std, torch.randn_like(mean))
        act = 2 * torch.rand_like(act) - 1 if args.rollout_policy == "uniform" else act
        next_obs, rew = dynamics.sample(obs, act)  # a member of its own for every row
        terminated = terminates(obs, act, next_obs)
        rows.append(pack(obs, act, rew, next_obs, terminated))
        alive.append(len(obs) / args.rollout_starts)
        obs = next_obs[~terminated]  # a rollout that ended stays ended
    rows = torch.cat(rows)
    _, _, rew, _, terminated = unpack(rows, obs.shape[1], act.shape[1])
    stats = {"reward_min": rew.min(), "reward_max": rew.max(), "reward_mean": rew.mean()}
    stats["ended_rollouts"] = terminated.sum() / args.rollout_starts
    return rows, {f"model/imagined_{k}": v for k, v in (stats | {"alive_at_last_step": alive[-1]}).items()}


# --- learner ---


def soft_maximum(q_sampled, log_density, temperature=1.0):
    """log sum_a exp Q(s,a) by importance sampling over 3N actions (CQL Eq. 4), up to log 3N.

    q_sampled (2, B, 3N), log_density (B, 3N) of the distribution that each action came from -> (2, B)
    """
    assert q_sampled.shape[1:] == log_density.shape
    return temperature * torch.logsumexp(q_sampled / temperature - log_density, -1)


class COMBO:
    """Conservative Q functions on SAC (arXiv:1812.05905), without entropy in the backup."""

    def __init__(self, obs_dim, act_dim, args, device):
        self.args, self.act_dim, self.device = args, act_dim, device
        self.policy = Policy(obs_dim, act_dim, args.hidden).to(device)
        self.qf = QFunctions(obs_dim, act_dim, args.hidden).to(device)
        self.target_qf = QFunctions(obs_dim, act_dim, args.hidden).to(device).requires_grad_(False)
        self.target_qf.load_state_dict(self.qf.state_dict())
        self.log_alpha = nn.ParameterDict({"sac": torch.zeros(())}).to(device)  # temperature
        self.target_entropy = -float(act_dim) if args.target_entropy is None else args.target_entropy
        adam = dict(fused=True, capturable=device.type == "cuda")
        self.qf_opt = torch.optim.Adam(self.qf.parameters(), lr=args.qf_lr, **adam)
        self.policy_opt = torch.optim.Adam(self.policy.parameters(), lr=args.policy_lr, **adam)
        self.alpha_opt = torch.optim.Adam(self.log_alpha.parameters(), lr=args.policy_lr, **adam)
        if args.compile:
            mode = "reduce-overhead" if device.type == "cuda" else None
            self.policy_loss, self.critic_loss = (torch.compile(f, mode=mode) for f in (self.policy_loss, self.critic_loss))

    def critic_loss(self, obs, act, rew, next_obs, terminated, num_real):
        """TD error on all rows (d_f) and conservative term, each summed over both Q functions (Eq. 2). Real rows stand first."""
        N, A, device = self.args.cql_samples, self.act_dim, obs.device
        rho = slice(num_real if self.args.rho_states == "model" and num_real < len(obs) else 0, None)
        B = len(obs[rho])
        with torch.no_grad():  # no gradient through sampled actions
            mean, log_std = self.policy(next_obs)
            next_act, _ = squash(mean, log_std, torch.randn_like(mean))
            target_q = rew + self.args.gamma * (1 - terminated) * self.target_qf(next_obs, next_act).amin(0)  # (B,)
            # N uniform actions, N of pi(.|s), N of pi(.|s'): the last are one more proposal for s and are evaluated at s
            now, then = (x.unsqueeze(1) for x in self.policy(obs[rho])), (mean[rho].unsqueeze(1), log_std[rho].unsqueeze(1))
            pi_act, pi_log_prob = zip(*(squash(*dist, torch.randn(B, N, A, device=device)) for dist in (now, then)), strict=True)
            acts = torch.cat([2 * torch.rand(B, N, A, device=device) - 1, *pi_act], 1)  # (B, 3N, A)
            log_density = torch.cat([torch.full((B, N), A * math.log(0.5), device=device), *pi_log_prob], 1)  # (B, 3N)
        q = self.qf(obs, act)  # (2, B)
        td_loss = (q - target_q).square().mean(1).sum()
        with torch.autocast(device.type, torch.bfloat16, enabled=self.args.bf16):
            q_sampled = self.qf(obs[rho].unsqueeze(1).expand(-1, 3 * N, -1), acts)  # (2, B, 3N)
        pushed_down = soft_maximum(q_sampled.float(), log_density, self.args.cql_temperature).mean(1).sum()
        pushed_up = q[:, :num_real].mean(1).sum()  # actions of the data only: imagined rows get none of it
        penalty = pushed_down - pushed_up
        q_means = {"q/data": pushed_up.detach() / 2, "q/sampled": q_sampled.detach().mean(), "q/target": target_q.mean()}
        return td_loss + self.args.beta * penalty, q_means | {"losses/conservative": penalty.detach()}

    def policy_loss(self, obs, alpha):
        """COMBO Eq. 3 with SAC's entropy (SAC Eq. 7)."""
        mean, log_std = self.policy(obs)
        act, log_prob = squash(mean, log_std, torch.randn_like(mean))
        return (alpha * log_prob - self.qf(obs, act).amin(0)).mean(), log_prob.detach().mean()

    def update(self, obs, act, rew, next_obs, terminated, num_real, step):
        """Q functions, policy, temperature, targets, in this order; returns metrics, which the next update may overwrite."""
        if self.args.compile:
            torch.compiler.cudagraph_mark_step_begin()
        alpha = self.log_alpha["sac"].detach().exp()
        critic_loss, q_metrics = self.critic_loss(obs, act, rew, next_obs, terminated, num_real)
        descend(self.qf_opt, critic_loss)
        if self.args.policy_lr_decay:
            rate = 0.5 * (1 + math.cos(math.pi * min(1, step / self.args.policy_lr_decay)))
            self.policy_opt.param_groups[0]["lr"] = rate * self.args.policy_lr
        policy_loss, log_prob = self.policy_loss(obs, alpha)
        descend(self.policy_opt, policy_loss, inputs=list(self.policy.parameters()))  # the Q functions get no gradient from it
        descend(self.alpha_opt, -self.log_alpha["sac"] * (log_prob + self.target_entropy))  # SAC Eq. 18, of log alpha: the same sign
        with torch.no_grad():  # or the targets would join the graph of the online networks, which then grows for ever
            torch._foreach_lerp_(list(self.target_qf.parameters()), list(self.qf.parameters()), self.args.tau)
        losses = {"losses/critic": critic_loss.detach(), "losses/policy": policy_loss.detach()}
        return losses | q_metrics | {"q/entropy": -log_prob, "q/alpha": alpha}

    @torch.no_grad()
    def act(self, obs):
        """obs (B, O) -> deterministic actions (B, A), on the CPU"""
        return self.policy(obs.to(self.device))[0].tanh().cpu()

    PARTS = ("policy", "qf", "target_qf", "log_alpha", "policy_opt", "qf_opt", "alpha_opt")

    def state_dict(self):
        return {k: getattr(self, k).state_dict() for k in self.PARTS}

    def load_state_dict(self, state):
        for k in self.PARTS:
            getattr(self, k).load_state_dict(state[k])


# --- main ---


def fitted_dynamics(data, args, device, run, key, given):
    """The forward model: from the checkpoint, from another run, or trained now."""
    known = data.has_next  # a row without a true successor teaches a model nothing but resets
    obs, act, rew, next_obs = (x[known].to(device) for x in (data.obs, data.act, data.rew, data.next_obs))
    cond, pred = obs, next_obs  # forwards
    torch.manual_seed(4 * args.seed)
    dynamics = Dynamics(obs.shape[1], act.shape[1], args).to(device)
    if run.state.get("phase", "dynamics") == "dynamics":
        dynamics.load_state_dict(given) if given else train_dynamics(dynamics, cond, act, rew, pred, args, run)
        run.log(0, {"model/data_reward_min": rew.min(), "model/data_reward_max": rew.max()})
        run.save("policy", 0, dynamics=dynamics.state_dict(), dynamics_training=None, model_key=key)
    dynamics.load_state_dict(run.state["dynamics"])
    return dynamics


class ModelBuffer:
    """The last rollouts (D_model). A checkpoint holds the policies that made them, not their rows: each rollout has a seed of
    its own, so a resumed run (same device, same number of threads) imagines the same rows again."""

    def __init__(self, task, data, dynamics, args, device, run):
        self.starts, self.dynamics, self.args, self.run = data.obs.to(device), dynamics, args, run
        self.terminates, self.policies, self.lengths = termination_fn(task, data), [], []
        self.rows = data.obs.new_empty(0, 2 * data.obs.shape[1] + data.act.shape[1] + 2).to(device)
        for step, policy in run.state.get("rollout_policies", []):
            self.add(step, {k: v.to(device) for k, v in policy.items()}, again=True)

    def add(self, step, weights, again=False):
        """Rollouts of the policy with these weights (a state dict); the oldest make room."""
        obs_dim, device, keep = self.starts.shape[1], self.starts.device, self.args.rollouts_kept
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(1_000_000 * (4 * self.args.seed + 2) + step // self.args.rollout_every)
            policy = Policy(obs_dim, len(self.dynamics.mean) - obs_dim, self.args.hidden).to(device)
            policy.load_state_dict(weights)
            rows, stats = imagine(self.starts, self.dynamics, policy, self.terminates, self.args)
        if not rows.isfinite().all():  # a single one would make losses NaN, even behind a mask: 0 * inf
            raise UserError("imagined rows are not finite: the model has diverged; try a shorter --horizon", status=3)
        if not again:
            self.run.log(step, stats)
        self.policies = [*self.policies, (step, policy.state_dict())][-keep:]
        self.lengths = [*self.lengths, len(rows)][-keep:]
        self.rows = torch.cat([self.rows, rows])[-sum(self.lengths) :]

    def __call__(self, size):
        """`size` rows, drawn uniformly: (size, 2 O + A + 2)"""
        return self.rows[torch.randint(len(self.rows), (size,), device=self.rows.device)]


def main(args):
    task = parse_task(args.env)
    args = resolve(args, task)
    device = pick_device(args.device)
    data = load_dataset(task, args.dataset)
    num_real = int((1 - args.model_ratio) * args.batch_size + 1e-6)  # rounded down: 128 of 256
    num_model = args.batch_size - num_real
    if num_model and data.has_next.sum() < 10:
        raise UserError(f"--dataset {args.dataset}: too few transitions with a known successor to train a model")
    key = model_key("forward", args, data)
    given = model_of_another_run(args, key) if args.dynamics_from and num_model else None
    envs = [make_env(task) for _ in range(args.eval_episodes)]
    run = Run(args, task, data, device)
    if run.finished:
        return print(f"{run.folder} is finished; more --total-updates would carry it on")
    torch.set_num_threads(args.num_threads)
    keep_freed_memory()
    if args.compile:
        torch._inductor.config.fallback_random = True  # the random numbers of eager mode
    random.seed(args.seed)
    np.random.seed(args.seed)

    obs_dim, act_dim = data.obs.shape[1], data.act.shape[1]
    dynamics = fitted_dynamics(data, args, device, run, key, given) if num_model else None  # Alg. 1, l. 1
    imagined = ModelBuffer(task, data, dynamics, args, device, run) if num_model else None
    torch.manual_seed(4 * args.seed + 3)  # with and without imagined data the learner starts from the same networks
    agent, step = COMBO(obs_dim, act_dim, args, device), 0
    if "agent" in run.state:
        agent.load_state_dict(run.state["agent"])
        step = run.state["step"]
        run.restore_rng()
    rows = pack(data.obs, data.act, data.rew, data.next_obs, data.terminated).to(device)

    bar, score = progress(args.total_updates, args.exp_name, "update", step), None
    begin, mark = (step, time.time()), (step, time.time())
    while step < args.total_updates:
        batch = rows[torch.randint(len(rows), (num_real,), device=device)]
        if num_model:
            if step % args.rollout_every == 0:
                imagined.add(step, agent.policy.state_dict())
            batch = torch.cat([batch, imagined(num_model)])  # Alg. 1, l. 5, 6: D u D_model; real rows stand first
        metrics = agent.update(*unpack(batch, obs_dim, act_dim), num_real, step)
        step += 1
        bar.update()
        save = step % args.checkpoint_every == 0 or step == args.total_updates
        if step % args.log_every == 0 or save:
            sps, mark = (step - mark[0]) / (time.time() - mark[1]), (step, time.time())
            run.log(step, metrics | {"charts/SPS": sps})
            shown = {k.removeprefix("losses/"): f"{v:.4g}" for k, v in metrics.items() if k.startswith("losses/")}
            bar.set_postfix(shown | ({} if score is None else {"score": score}))
        if args.eval_episodes and (step % args.eval_every == 0 or step == args.total_updates):
            score = round(run.evaluate(step, envs, agent.act), 1)
            if num_model:
                run.log(step, model_error(dynamics, agent.act, run.seen, args.horizon))
        if save:
            if not all(p.isfinite().all() for p in (*agent.policy.parameters(), *agent.qf.parameters())):
                raise UserError(f"weights not finite at update {step}; {run.folder} keeps its last good checkpoint", status=3)
            run.save("policy", step, agent=agent.state_dict(), **({"rollout_policies": imagined.policies} if num_model else {}))
    bar.close()
    trained = step - begin[0]  # in this process; nothing is left where a run was killed just before its end
    run.finish(step, trained / (time.time() - begin[1]) if trained else step / (run.elapsed + 1e-9))


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__.split("\n")[0] + " Equations and symbols: the docstring at the top of the file."))
    except UserError as e:
        sys.exit(e.report())
    except KeyboardInterrupt:
        tqdm.write("interrupted; the same command goes on from the last checkpoint, if there is one", file=sys.stderr)
        sys.exit(130)
