"""FOMI-BCQ: ROMI-BCQ turned forward (ROMI Sec. 4.3), the ablation of the direction of imagination.

Papers: Wang et al. 2021, arXiv:2110.00188 (ROMI); Fujimoto et al. 2019, arXiv:1812.02900 (BCQ). Reference code: wenzhe-li/romi,
sfujim/BCQ (continuous_BCQ).

  forward model    p(s', r | s, a), ensemble of Gaussians         maximum likelihood on the data         ROMI Eq. 1, 2, turned
  rollout policy   G_theta(a | s): conditional VAE                 variational bound on the data          ROMI Eq. 3, turned
                   or pi(a | s): behaviour cloning                 maximum likelihood on the data         ROMI Eq. 4, turned
                   or uniform on [-1, 1]^A
  imagination      a ~ G_theta(.|s), (s', r) ~ p(.|s, a), then s <- s', h times, from states of the data        ROMI Alg. 1, l. 10-14
  learner          BCQ on batches with a share eta of imagined transitions                                ROMI Alg. 1, l. 15-16
                   y = r + gamma (1 - d) max_i [lambda min_j Q'_j(s', a_i) + (1 - lambda) max_j Q'_j(s', a_i)]   BCQ Eq. 13
                   a_i = a + xi'(s', a, Phi), a ~ G_omega(.|s'): the generator, a VAE trained on the batch       BCQ Alg. 1
                   xi <- argmax Q_1(s, a + xi(s, a, Phi)), |xi| <= Phi                                           BCQ Eq. 12

    python algorithms/fomi_bcq.py --env maze2d-umaze
    python algorithms/fomi_bcq.py --env maze2d-umaze --model-ratio 0                                      # plain BCQ

Where paper and code disagree we follow the code: the KL has a quarter of Eq. 3's weight, sampled latents are clipped to +-0.5, a
batch has a fixed share eta of imagined rows (the paper draws from the union), start states are rows of the data's s column, and
they and the real rows of a batch are drawn by the return of their trajectory (the worst is never drawn; not on maze2d: SETTINGS).
Differences from the code:
  1. Batches are split exactly, round(eta B) imagined rows and the rest real.
  2. This return-prioritised sampling draws with replacement from exact proportions, not without replacement from a sum tree; it
     is two switches; and where all its weights are 0 we sample uniformly.
  3. Every row with a recorded successor trains the models, also at terminals and time limits; the reference drops those.
  4. RBC is ROMI-BCQ's turned; the reference has it in reverse only, less half an entropy and with the std as a variance.
  5. Elites are chosen once, on the holdout rows of training; the reference draws new holdout rows when it reloads the model.
  6. The goal of an antmaze is the middle of the rewarded positions, not asked from the simulator; antmaze-* is v2, there v0.
  7. Rows at a time limit with a recorded successor are real rows of BCQ, which bootstrap; the reference drops them.
  8. A state of hopper below -100 ends a chain as one above 100 does (a slip in the reference's rule).
BCQ's generator is trained on the mixed batch, as in the reference: with uniform imagined actions it no longer proposes what the data
do, but about the mean of the mixture. Symbols are those of the paper beside them (ROMI's own omega, xi, phi: encoder, decoder, reverse
model); d: terminated, lambda: --lmbda.
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
from functools import partial
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
    env: Annotated[str, tyro.conf.arg(aliases=["--env-id"])] = "maze2d-umaze"  # D4RL task (version optional) or Minari id
    exp_name: str | None = None  # None: fomi_bcq; bcq without imagined data
    seed: int = 0
    total_updates: int = 1_000_000  # gradient updates of the learner; a larger number later carries a finished run on
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    num_threads: int | None = None  # threads on the CPU; None: all cores
    compile: bool = False  # torch.compile the losses; on a GPU with CUDA graphs
    bf16: bool = False  # bfloat16 in the learner's hidden layers; their weights, first and last layers and losses stay float32
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
    rollout_policy: Literal["cvae", "uniform", "rbc"] | None = None  # which actions are imagined; None: by task
    priority_rollout: bool | None = None  # draw start states by the return of their trajectory
    priority_policy: bool | None = None  # draw the real rows of each batch by the return of their trajectory
    model_buffer_size: int = 4_000_000  # imagined transitions, made once before policy learning
    rollout_batch_size: int = 20_000  # start states per call; the distribution does not depend on it
    clip_rewards: bool = False  # clip imagined rewards to the range of the data
    rollout_policy_updates: int = 500_000  # of the learnt rollout policy
    rollout_policy_batch_size: int = 100
    rollout_policy_lr: float = 1e-3
    vae_hidden: int = 750  # width of the 2 hidden layers of encoder and decoder, here and in BCQ's generator
    kl_weight: float = 0.5  # of the mean KL; the paper's unit weight in summed form would be 2
    latent_clip: float = 0.5  # sampled latents are clipped to +- this; inf as in the paper
    rbc_hidden: int = 256  # width of the 2 hidden layers
    rbc_entropy: float = 0.0  # weight of an entropy bonus; 0.5 in the reference

    # --- learner ---
    batch_size: int = 100  # real and imagined rows together
    gamma: float = 0.99  # discount
    tau: float = 0.005  # rate of the target networks
    hidden: tuple[int, int] = (400, 300)  # widths of the hidden layers of perturbation and Q functions
    lr: float = 1e-3  # Q functions, perturbation and generator
    lmbda: float = 0.75  # weight of the smaller of the two Q functions in the target
    phi: float = 0.05  # largest perturbation of a generated action
    bcq_samples: int = 10  # generated actions per next state in the target
    eval_samples: int = 100  # generated actions per state when acting; the one with the largest Q_1 is taken


# h, eta, rollout policy, return-prioritised sampling: wenzhe-li/romi, train_bcq.py and cql_mujoco_new.py; "ours" is not in
# the reference. The longest key that the task begins with counts.
SETTINGS = {
    "maze2d-umaze": (5, 0.7, "uniform", False),
    "maze2d-medium": (5, 0.5, "uniform", False),
    "maze2d-large": (5, 0.3, "uniform", False),
    "antmaze": (5, 0.1, "cvae", True),
    "halfcheetah": (1, 0.1, "cvae", True),
    "hopper": (5, 0.1, "uniform", True),
    "walker2d": (1, 0.1, "cvae", True),
    "ant": (1, 0.1, "cvae", True),  # ours: as walker2d
    "": (1, 0.1, "cvae", True),  # ours: any other environment
}
# Flags that change no update (the number of threads only its rounding): a run may be carried on with other values of them.
BOOKKEEPING = {"run_dir", "checkpoint_every", "log_every", "num_threads", "total_updates", "track", "device", "dynamics_from"}
BOOKKEEPING |= {"wandb_project_name", "wandb_entity", "wandb_group"}
BOOKKEEPING |= {"dataset"}  # their contents count, not how they were asked for
ADDED = {"bf16", "dynamics_bf16"}  # flags younger than the first runs: one that was begun without them goes on with the default
MAY_BE_ZERO = {"seed", "model_ratio", "eval_episodes", "kl_weight", "rbc_entropy", "dynamics_weight_decay", "gamma", "lmbda", "phi"}
MAY_BE_ZERO |= {"dynamics_patience"}


def resolve(args, task):
    """The arguments with the task's settings where the user left None; UserError for what cannot work."""
    key = max((k for k in SETTINGS if f"{task.domain}-{task.kind}".startswith(k)), key=len)
    horizon, ratio, policy, priority = SETTINGS[key]
    tuned = dict(horizon=horizon, model_ratio=ratio, rollout_policy=policy, priority_rollout=priority, priority_policy=priority)
    args = replace(args, **{k: v for k, v in tuned.items() if getattr(args, k) is None})
    for name, value in asdict(args).items():
        for v in value if isinstance(value, tuple) else (value,):
            flag = f"--{name.replace('_', '-')} {v}"
            if type(v) is float and not math.isfinite(v) and not (name == "latent_clip" and v > 0):
                raise UserError(f"{flag}: must be a finite number")
            if type(v) in (int, float):
                if v < 0 or (v == 0 and name not in MAY_BE_ZERO):
                    raise UserError(f"{flag}: must be {'at least 0' if name in MAY_BE_ZERO else 'positive'}")
                if (v > 1 and name in ("gamma", "tau", "model_ratio", "lmbda")) or (v >= 1 and name == "holdout_ratio"):
                    raise UserError(f"{flag}: must be {'below' if name == 'holdout_ratio' else 'at most'} 1")
    if args.num_elites > args.ensemble_size or len(args.dynamics_weight_decay) != 5:
        raise UserError("--num-elites must not exceed --ensemble-size, and --dynamics-weight-decay needs 5 values")
    if args.model_ratio > 0 and round(args.model_ratio * args.batch_size) == 0:
        raise UserError(f"--model-ratio {args.model_ratio}: not one row of a batch of {args.batch_size}; 0 switches the model off")
    name = "fomi_bcq" if args.model_ratio > 0 else "bcq"
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


def squashed_log_prob(mean, log_std, act):
    """Log-density of given actions under the tanh-squashed Gaussian; |act| is clipped to 1 - 1e-6: (..., A) -> (...)"""
    pre_tanh = act.clamp(-1 + 1e-6, 1 - 1e-6).atanh()
    return squash(mean, log_std, (pre_tanh - mean) * (-log_std).exp())[1]


class Perturbation(nn.Module):
    """a + xi(s, a, phi), clipped to [-1, 1]; xi lies within +- phi."""

    def __init__(self, obs_dim, act_dim, args):
        super().__init__()
        self.phi, self.net = args.phi, mlp(obs_dim + act_dim, *args.hidden, act_dim)

    def forward(self, obs, act):
        """obs (B, O), act (B, A) -> (B, A)"""
        return (act + self.phi * self.net(torch.cat([obs, act], -1)).tanh()).clamp(-1, 1)


class QFunctions(nn.Module):
    """Q_1(s,a) and Q_2(s,a)."""

    def __init__(self, obs_dim, act_dim, args):
        super().__init__()
        self.q1 = mlp(obs_dim + act_dim, *args.hidden, 1)
        self.q2 = mlp(obs_dim + act_dim, *args.hidden, 1)

    def forward(self, obs, act):
        """obs (B, O), act (B, A) -> (2, B)"""
        x = torch.cat([obs, act], -1)
        return torch.stack([self.q1(x), self.q2(x)]).squeeze(-1)


class ConditionalVAE(nn.Module):
    """G(a|c) with encoder E(c, a) and decoder D(c, z); the condition c is a state, s' for a reverse policy."""

    def __init__(self, obs_dim, act_dim, args):
        super().__init__()
        self.latent_dim, self.args = 2 * act_dim, args
        self.encoder = mlp(obs_dim + act_dim, args.vae_hidden, args.vae_hidden, 2 * self.latent_dim)
        self.decoder = mlp(obs_dim + self.latent_dim, args.vae_hidden, args.vae_hidden, act_dim)

    def decode(self, cond, latent):
        return self.decoder(torch.cat([cond, latent], -1)).tanh()

    def loss(self, cond, act):
        """Reconstruction error and KL to N(0, I), each a mean over batch and dimensions (ROMI Eq. 3)."""
        mean, log_std = self.encoder(torch.cat([cond, act], -1)).chunk(2, -1)
        log_std = log_std.clamp(-4, 15)
        recon = self.decode(cond, mean + log_std.exp() * torch.randn_like(mean))
        kl = -0.5 * (1 + 2 * log_std - mean.square() - (2 * log_std).exp()).mean()
        return F.mse_loss(recon, act) + self.args.kl_weight * kl

    def sample(self, cond):
        """cond (B, O) -> (B, A)"""
        latent = torch.randn(len(cond), self.latent_dim, device=cond.device)
        return self.decode(cond, latent.clamp(-self.args.latent_clip, self.args.latent_clip))


class BehaviourCloning(nn.Module):
    """pi(a|c): tanh-squashed Gaussian on standardised states; on s' it is reverse behaviour cloning, RBC (ROMI Sec. 4.4)."""

    def __init__(self, obs_dim, act_dim, args):
        super().__init__()
        self.args, self.net = args, mlp(obs_dim, args.rbc_hidden, args.rbc_hidden, 2 * act_dim)
        self.register_buffer("mean", torch.zeros(obs_dim))
        self.register_buffer("std", torch.ones(obs_dim))

    def forward(self, cond):
        mean, log_std = self.net((cond - self.mean) / self.std).chunk(2, -1)
        return mean, log_std.clamp(-20, 2)

    def loss(self, cond, act):
        """Negative log-likelihood (ROMI Eq. 4), less an entropy bonus if asked for."""
        mean, log_std = self(cond)
        return -squashed_log_prob(mean, log_std, act).mean() - self.args.rbc_entropy * log_std.sum(-1).mean()

    def sample(self, cond):
        mean, log_std = self(cond)
        return squash(mean, log_std, torch.randn_like(mean))[0]


class UniformPolicy(nn.Module):
    """Uniform on [-1, 1]^A, "an extremely diverse policy in easy tasks" (ROMI Sec. 3)."""

    def __init__(self, obs_dim, act_dim, args):
        super().__init__()
        self.sample = lambda cond: 2 * torch.rand(len(cond), act_dim, device=cond.device) - 1


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


def train_rollout_policy(policy, cond, act, args, run):
    """CVAE or RBC on the states and actions of the data (ROMI Alg. 1, l. 7-9)."""
    opt, step = torch.optim.Adam(policy.parameters(), lr=args.rollout_policy_lr, fused=True), 0
    if args.rollout_policy == "rbc":
        policy.mean.copy_(cond.mean(0))
        policy.std.copy_(cond.std(0) + 1e-6)
    if "rollout_policy_opt" in run.state:
        policy.load_state_dict(run.state["rollout_policy"])
        opt.load_state_dict(run.state["rollout_policy_opt"])
        step = run.state["step"]
        run.restore_rng()
    loss_fn = torch.compile(policy.loss) if args.compile else policy.loss
    bar = progress(args.rollout_policy_updates, f"rollout policy ({args.rollout_policy})", "update", step)
    while step < args.rollout_policy_updates:
        idx = torch.randint(len(act), (args.rollout_policy_batch_size,), device=act.device)
        loss = loss_fn(cond[idx], act[idx])
        descend(opt, loss)
        step += 1
        bar.update()
        if step % args.log_every == 0 or step % args.checkpoint_every == 0:
            run.log(0, {"model/rollout_policy_update": step, "losses/rollout_policy": loss.detach()})
            bar.set_postfix(loss=f"{loss.item():.4g}")
        if step % args.checkpoint_every == 0:
            run.save("rollout_policy", step, rollout_policy=policy.state_dict(), rollout_policy_opt=opt.state_dict())
    bar.close()


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


def priority_weights(returns):
    """(N,) return of each row's trajectory -> weights in [0, 1], 0 for the worst (wenzhe-li/romi, dataset_processor.py)."""
    return (returns - returns.min()) / (returns.max() - returns.min()).clamp(min=1)


class Sampler:
    """Row numbers below n with replacement, uniform or in exact proportion to weights; uniform, too, if all weights are 0."""

    def __init__(self, n, weights, device):
        self.n, self.device = n, device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.cdf = None if weights is None or weights.sum() == 0 else weights.double().cumsum(0).to(device, dtype)

    def __call__(self, size):
        if self.cdf is None:
            return torch.randint(self.n, (size,), device=self.device)
        u = torch.rand(size, dtype=self.cdf.dtype, device=self.device) * self.cdf[-1]
        return torch.searchsorted(self.cdf, u, right=True).clamp_(max=self.n - 1)  # right: no u leads to a row of weight 0


@torch.no_grad()
def imagine(starts, dynamics, rollout_policy, terminates, sampler, reward_range, args):
    """Forward rollouts from rows of `starts` (N, O) until the buffer is full: (M, 2 O + A + 2) and what to log
    (ROMI Alg. 1, l. 10-14)."""
    num_starts = min(args.rollout_batch_size, math.ceil(args.model_buffer_size / args.horizon))  # whole chains in a small buffer, too
    buffer, filled, chains, cut = None, 0, 0, 0
    bar = progress(args.model_buffer_size, "imagination", "row")
    while filled < args.model_buffer_size:
        cond = starts[sampler(num_starts)]  # states s_t of the data, l. 12
        chains += len(cond)
        for i in range(args.horizon):
            act = rollout_policy.sample(cond)  # a_t ~ G(.|s_t), l. 13
            pred, rew = dynamics.sample(cond, act)  # s_t+1, r_t ~ p(.|s_t, a_t), l. 13
            obs, next_obs = cond, pred
            rew = rew.clamp(*reward_range) if args.clip_rewards else rew
            terminated = terminates(obs, act, next_obs)  # about the imagined end of the transition
            rows = pack(obs, act, rew, next_obs, terminated)[: args.model_buffer_size - filled]
            buffer = rows.new_empty(args.model_buffer_size, rows.shape[1]) if buffer is None else buffer
            buffer[filled : filled + len(rows)] = rows  # l. 14
            filled += len(rows)
            cut += terminated.sum().item() if i == 0 else 0
            cond = pred[~terminated]  # one step on in time; a chain that ended stays ended
        bar.update(filled - bar.n)
    bar.close()
    _, _, rew, _, terminated = unpack(buffer, obs.shape[1], act.shape[1])
    stats = {"reward_min": rew.min(), "reward_max": rew.max(), "reward_mean": rew.mean(), "terminated": terminated.mean()}
    return buffer, {f"model/imagined_{k}": v for k, v in stats.items()} | {"model/chains_cut_at_step_1": cut / chains}


# --- learner ---


def soft_clipped_value(q, lmbda):
    """lambda min_j Q_j + (1 - lambda) max_j Q_j, then the best action of each state (BCQ Eq. 13): q (2, B, N) -> (B,)"""
    return (lmbda * q.amin(0) + (1 - lmbda) * q.amax(0)).amax(1)


class BCQ:
    """Batch-constrained Q-learning, continuous (sfujim/BCQ, continuous_BCQ/BCQ.py)."""

    def __init__(self, obs_dim, act_dim, args, device):
        self.args, self.device = args, device
        own = replace(args, latent_clip=0.5, kl_weight=0.5)  # as in BCQ, whatever the rollout policy has
        self.vae = ConditionalVAE(obs_dim, act_dim, own).to(device)  # the generator, conditioned on s
        self.perturb = Perturbation(obs_dim, act_dim, args).to(device)
        self.target_perturb = Perturbation(obs_dim, act_dim, args).to(device).requires_grad_(False)
        self.target_perturb.load_state_dict(self.perturb.state_dict())
        self.qf = QFunctions(obs_dim, act_dim, args).to(device)
        self.target_qf = QFunctions(obs_dim, act_dim, args).to(device).requires_grad_(False)
        self.target_qf.load_state_dict(self.qf.state_dict())
        adam = dict(lr=args.lr, fused=True, capturable=device.type == "cuda")
        self.vae_opt = torch.optim.Adam(self.vae.parameters(), **adam)
        self.perturb_opt = torch.optim.Adam(self.perturb.parameters(), **adam)
        self.qf_opt = torch.optim.Adam(self.qf.parameters(), **adam)
        self.vae_loss = self.vae.loss
        self.autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=args.bf16)
        if args.compile:
            mode = "reduce-overhead" if device.type == "cuda" else None
            for name in ("vae_loss", "critic_loss", "perturb_loss"):
                setattr(self, name, torch.compile(getattr(self, name), mode=mode))

    def critic_loss(self, obs, act, rew, next_obs, terminated):
        """TD error against the soft-clipped value of the best of N generated, perturbed actions (BCQ Eq. 13)."""
        B, N = len(obs), self.args.bcq_samples
        with torch.no_grad():
            rep = next_obs.repeat_interleave(N, 0)  # (B N, O)
            next_act = self.target_perturb(rep, self.vae.sample(rep))  # (B N, A)
            next_q = self.target_qf(rep, next_act).view(2, B, N)
            target_q = rew + self.args.gamma * (1 - terminated) * soft_clipped_value(next_q, self.args.lmbda)  # (B,)
        q = self.qf(obs, act)  # (2, B)
        return (q - target_q).square().mean(1).sum(), {"q/batch": q.detach().mean(), "q/target": target_q.mean()}

    def perturb_loss(self, obs):
        """-Q_1 of one generated, perturbed action per state (BCQ Eq. 12)."""
        with torch.no_grad():
            act = self.vae.sample(obs)
        return -self.qf.q1(torch.cat([obs, self.perturb(obs, act)], -1)).mean()

    def update(self, obs, act, rew, next_obs, terminated):
        """Generator, Q functions, perturbation, targets, in this order; returns metrics, which the next update may overwrite."""
        if self.args.compile:
            torch.compiler.cudagraph_mark_step_begin()
        with self.autocast():  # one context a loss: it keeps the bfloat16 copies of the weights that it has made
            vae_loss = self.vae_loss(obs, act)
        descend(self.vae_opt, vae_loss)
        with self.autocast():
            critic_loss, q_metrics = self.critic_loss(obs, act, rew, next_obs, terminated)
        descend(self.qf_opt, critic_loss)
        with self.autocast():
            perturb_loss = self.perturb_loss(obs)
        descend(self.perturb_opt, perturb_loss, inputs=list(self.perturb.parameters()))  # Q functions get no gradient from it
        online, target = ([*q.parameters(), *p.parameters()] for q, p in ((self.qf, self.perturb), (self.target_qf, self.target_perturb)))
        with torch.no_grad():  # or the targets would join the graph of the online networks, which then grows for ever
            torch._foreach_lerp_(target, online, self.args.tau)
        losses = {"losses/vae": vae_loss, "losses/critic": critic_loss, "losses/perturb": perturb_loss}
        return {k: v.detach() for k, v in losses.items()} | q_metrics

    @torch.no_grad()
    def act(self, obs):
        """obs (B, O) -> the best of many generated actions by Q_1, (B, A), on the CPU"""
        B, N, rep = len(obs), self.args.eval_samples, obs.to(self.device).repeat_interleave(self.args.eval_samples, 0)
        acts = self.perturb(rep, self.vae.sample(rep))  # (B N, A)
        best = self.qf(rep, acts)[0].view(B, N).argmax(1)
        return acts.view(B, N, -1)[torch.arange(B, device=self.device), best].cpu()

    PARTS = ("vae", "perturb", "target_perturb", "qf", "target_qf", "vae_opt", "perturb_opt", "qf_opt")

    def state_dict(self):
        return {k: getattr(self, k).state_dict() for k in self.PARTS}

    def load_state_dict(self, state):
        for k in self.PARTS:
            getattr(self, k).load_state_dict(state[k])


# --- main ---


def imagined_data(task, data, args, device, run, key, given):
    """Forward model, rollout policy, imagination (ROMI Alg. 1, l. 2-14), each phase taken up where the checkpoint left it.

    Every phase begins with a seed of its own, so a resumed run (same device, same number of threads) imagines the same rows
    again and need not store gigabytes.
    """
    known = data.has_next  # a row without a true successor teaches a model nothing but resets
    obs, act, rew, next_obs = (x[known].to(device) for x in (data.obs, data.act, data.rew, data.next_obs))
    cond, pred = obs, next_obs  # forwards
    torch.manual_seed(4 * args.seed)  # forward model, l. 2-5: maximum likelihood, Eq. 2, turned
    dynamics = Dynamics(obs.shape[1], act.shape[1], args).to(device)
    if run.state.get("phase", "dynamics") == "dynamics":
        dynamics.load_state_dict(given) if given else train_dynamics(dynamics, cond, act, rew, pred, args, run)
        run.save("rollout_policy", 0, dynamics=dynamics.state_dict(), dynamics_training=None, model_key=key)
    dynamics.load_state_dict(run.state["dynamics"])

    torch.manual_seed(4 * args.seed + 1)  # rollout policy, l. 7-9: Eq. 3 (CVAE) or 4 (RBC), turned
    policy_class = {"cvae": ConditionalVAE, "rbc": BehaviourCloning, "uniform": UniformPolicy}[args.rollout_policy]
    rollout_policy = policy_class(obs.shape[1], act.shape[1], args).to(device)
    if run.state["phase"] == "rollout_policy":
        if args.rollout_policy != "uniform":
            train_rollout_policy(rollout_policy, cond, act, args, run)
        run.save("policy", 0, rollout_policy=rollout_policy.state_dict(), rollout_policy_opt=None)
    rollout_policy.load_state_dict(run.state["rollout_policy"])

    torch.manual_seed(4 * args.seed + 2)  # imagination, l. 10-14
    starts = Sampler(len(data), priority_weights(data.trajectory_returns()) if args.priority_rollout else None, device)
    reward_range = data.rew.min().item(), data.rew.max().item()
    terminates = termination_fn(task, data)
    imagined, stats = imagine(data.obs.to(device), dynamics, rollout_policy, terminates, starts, reward_range, args)
    if not imagined.isfinite().all():
        raise UserError("imagined rows are not finite: the model has diverged; try a smaller --dynamics-lr", status=3)
    h, B = args.horizon, min(args.rollout_batch_size, math.ceil(len(imagined) / args.horizon))
    n = min(500, B, len(imagined) - (h - 1) * B)  # whole chains of the first call
    if task.domain == "maze2d" and n > 0:  # nothing ends here: a call's rows are h blocks of B, block i step i of its B chains
        from maze2d_env import replay_error

        chains = torch.stack([imagined[i * B : i * B + n] for i in range(h)], 1).cpu()  # (C, h, ...)
        obs, act, _, next_obs, _ = unpack(chains, 4, 2)  # forward in time
        run.draw("imagination", torch.cat([obs[:, :1], next_obs], 1).numpy())
        one, all_steps = replay_error(task.kind.split("-")[0], *(x.double().numpy() for x in (obs, act, next_obs)))
        stats |= {"model/replay_error_1": one, f"model/replay_error_{h}": all_steps}
    if "agent" not in run.state:
        run.log(0, stats | {"model/data_reward_min": reward_range[0], "model/data_reward_max": reward_range[1]})
    return imagined


def main(args):
    task = parse_task(args.env)
    args = resolve(args, task)
    device = pick_device(args.device)
    data = load_dataset(task, args.dataset)
    if args.model_ratio > 0 and data.has_next.sum() < 10:
        raise UserError(f"--dataset {args.dataset}: too few transitions with a known successor to train a model")
    key = model_key("forward", args, data)
    given = model_of_another_run(args, key) if args.dynamics_from and args.model_ratio > 0 else None
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
    num_model = round(args.model_ratio * args.batch_size)
    imagined = imagined_data(task, data, args, device, run, key, given) if num_model else None
    torch.manual_seed(4 * args.seed + 3)  # with and without imagined data the learner starts from the same networks
    agent, step = BCQ(obs_dim, act_dim, args, device), 0
    if "agent" in run.state:
        agent.load_state_dict(run.state["agent"])
        step = run.state["step"]
        run.restore_rng()
    rows = pack(data.obs, data.act, data.rew, data.next_obs, data.terminated).to(device)
    real = Sampler(len(data), priority_weights(data.trajectory_returns()) if args.priority_policy else None, device)

    bar, score = progress(args.total_updates, args.exp_name, "update", step), None
    begin, mark = (step, time.time()), (step, time.time())
    while step < args.total_updates:  # ROMI Alg. 1, l. 15-16: D_env u D_model, exactly num_model rows of a batch imagined
        batch = rows[real(args.batch_size - num_model)]
        if num_model:
            batch = torch.cat([batch, imagined[torch.randint(len(imagined), (num_model,), device=device)]])
        metrics = agent.update(*unpack(batch, obs_dim, act_dim))
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
        if save:
            if not all(p.isfinite().all() for p in (*agent.vae.parameters(), *agent.qf.parameters())):
                raise UserError(f"weights not finite at update {step}; {run.folder} keeps its last good checkpoint", status=3)
            run.save("policy", step, agent=agent.state_dict())
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
