"""ROMI-CQL: reverse model-based imagination before policy learning, CQL as the learner.

Papers: Wang et al. 2021, arXiv:2110.00188 (ROMI); Kumar et al. 2020, arXiv:2006.04779 (CQL). Reference code: wenzhe-li/romi.

  reverse model    p(s, r | s', a), ensemble of Gaussians         maximum likelihood on the data         ROMI Eq. 1, 2
  reverse policy   G(a | s'): conditional VAE                      variational bound on the data          ROMI Eq. 3
                   or pi(a | s'): behaviour cloning (RBC)          maximum likelihood on the data         ROMI Eq. 4
                   or uniform on [-1, 1]^A
  imagination      a ~ G(.|s'), (s, r) ~ p(.|s', a), then s' <- s, h times, from states of the data       ROMI Alg. 1, l. 11-14
  learner          CQL(H) on batches with a share eta of imagined transitions                             ROMI Alg. 1, l. 15-16
                   min_Q alpha (E_s[log sum_a exp Q(s,a)] - E_(s,a)[Q(s,a)]) + E[(Q - B Q_target)^2]      CQL Eq. 4

    python algorithms/romi_cql.py --env hopper-medium-replay
    python algorithms/romi_cql.py --env hopper-medium-replay --model-ratio 0                              # plain CQL
    python algorithms/romi_cql.py --env hopper-medium-replay --model-ratio 0 --bc-warmup 1000000          # behaviour cloning

Differences from the reference code (where paper and code disagree, we follow the code unless a line below says otherwise):
  1. Batches are split exactly, round(eta B) imagined rows and the rest real; the reference loses a row to rounding (255 of 256).
  2. Return-prioritised sampling draws with replacement from exact proportions; the reference draws without replacement within a
     batch, from a sum tree. It is two switches here; the paper's main text does not mention it. If all trajectories have the
     same return all its weights are 0, and we sample uniformly.
  3. Terminal rows with a recorded successor train the models too; the reference has no successor for them and drops them.
  4. RBC minimises the paper's negative log-likelihood; the reference subtracts half an entropy and takes the std as a variance.
  5. The conservative term is computed without a gradient through the sampled actions (only Q's optimiser steps anyway).
  6. Elites are chosen once, on the holdout rows of training; the reference draws new holdout rows when it reloads the model.
  7. 1 000 000 updates; the reference runs 1 500 000.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from utils import UserError, evaluate, load_dataset, make_env, normalized_score, parse_task


@dataclass
class Args:
    # --- experiment ---
    env: Annotated[str, tyro.conf.arg(aliases=["--env-id"])] = "hopper-medium-replay"
    """D4RL task, with or without version, or a Minari data set id"""
    exp_name: str | None = None
    """name of the run; None: romi_cql, cql without imagined data, bc if the warm-up never ends"""
    seed: int = 0
    total_updates: int = 1_000_000
    """gradient updates of the learner; a larger number later carries a finished run on"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    num_threads: int | None = None
    """threads on the CPU; None: all cores"""
    compile: bool = False
    """torch.compile the losses; on a GPU with CUDA graphs"""
    bf16: bool = False
    """bfloat16 for the conservative term's 3N actions per state, the bulk of an update; everything else stays float32"""
    run_dir: str = "runs"
    checkpoint_every: int = 10_000
    """updates between checkpoints; dynamics training writes one an epoch"""

    # --- logging ---
    track: bool = False
    """log to Weights & Biases as well"""
    wandb_project_name: str = "rewind"
    wandb_entity: str | None = None
    wandb_group: str | None = None
    log_every: int = 1_000
    """updates"""

    # --- data and evaluation ---
    dataset: str = "auto"
    """auto, d4rl, bundled, generated, a Minari id, or the path of an HDF5 file in D4RL layout"""
    eval_every: int = 5_000
    """updates"""
    eval_episodes: int = 10
    """episodes per evaluation, deterministic actions; 0: never touch the simulator"""

    # --- dynamics ---
    ensemble_size: int = 7
    num_elites: int = 5
    """members with the lowest holdout error; only these imagine"""
    dynamics_hidden: int = 200
    """width of the 4 hidden layers"""
    dynamics_lr: float = 1e-3
    dynamics_batch_size: int = 256
    dynamics_weight_decay: tuple[float, ...] = (2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4)
    """L2 on the weights of each layer"""
    dynamics_max_epochs: int | None = None
    """None: until the holdout error stops falling, as the reference"""
    dynamics_patience: int = 5
    """epochs without a member that improves by 1 % on its best; training stops on the next one"""
    holdout_ratio: float = 0.2
    holdout_max: int = 1_000
    """rows held out: this share of the data, at most this many"""

    # --- rollout ---
    horizon: int | None = None
    """imagined steps per start state (h); None: the task's"""
    model_ratio: float | None = None
    """share of imagined transitions in a batch (eta; 1 - real_ratio elsewhere); None: the task's; 0: the base learner"""
    rollout_policy: Literal["cvae", "uniform", "rbc"] | None = None
    """reverse policy; None: the task's"""
    priority_rollout: bool | None = None
    """draw start states by the return of their trajectory; None: the task's"""
    priority_policy: bool | None = None
    """draw the real part of each batch by the return of its trajectory; None: the task's"""
    model_buffer_size: int = 4_000_000
    """imagined transitions, made once before policy learning"""
    rollout_batch_size: int = 20_000
    """start states per call; has no influence on the distribution"""
    clip_rewards: bool = False
    """clip imagined rewards to the range of the data"""
    reverse_policy_updates: int = 500_000
    """updates of the CVAE or of RBC (C_theta)"""
    reverse_policy_batch_size: int = 100
    reverse_policy_lr: float = 1e-3
    vae_hidden: int = 750
    """width of the two hidden layers of encoder and decoder"""
    kl_weight: float = 0.5
    """weight of the mean KL; the paper's summed form with unit weight is about 2"""
    latent_clip: float = 0.5
    """sampled latents are clipped to +- this; the paper does not clip (inf)"""
    rbc_hidden: int = 256
    """width of the two hidden layers of RBC"""
    rbc_entropy: float = 0.0
    """weight of RBC's entropy bonus; 0.5 in the reference"""

    # --- learner ---
    batch_size: int = 256
    gamma: float = 0.99
    tau: float = 0.005
    """rate of the target networks"""
    hidden: int = 256
    """width of the 3 hidden layers of policy and Q functions"""
    qf_lr: float = 3e-4
    policy_lr: float = 1e-4
    """policy and temperature"""
    target_entropy: float | None = None
    """None: minus the number of action dimensions"""
    bc_warmup: int = 40_000
    """updates in which the policy clones the data; the Q functions train all the while"""
    cql_alpha: float = 5.0
    """weight of the conservative term; its start if --lagrange"""
    cql_samples: int = 10
    """actions per source (N): uniform, pi(.|s), pi(.|s')"""
    cql_temperature: float = 1.0
    lagrange: bool = False
    """tune the weight so that the conservative term stays near --lagrange-gap"""
    lagrange_gap: float = 10.0


# h, eta, reverse policy, return-prioritised sampling. Source: wenzhe-li/romi, train_bcq.py and cql_mujoco_new.py; the lines
# marked "ours" are not in the reference. The longest prefix of the task's id wins.
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
# Flags that change no number of a run, so that a run may be carried on with other values of them.
BOOKKEEPING = {"run_dir", "checkpoint_every", "num_threads", "total_updates", "track", "log_every"}
BOOKKEEPING |= {"wandb_project_name", "wandb_entity", "wandb_group"}


def resolve(args, task):
    """The arguments with the task's settings wherever the user left None, and a UserError for what cannot work."""
    key = max((k for k in SETTINGS if (task.domain or "?") and f"{task.domain}-{task.kind}".startswith(k)), key=len)
    names = ("horizon", "model_ratio", "rollout_policy", "priority_rollout", "priority_policy")
    tuned = dict(zip(names, (*SETTINGS[key], SETTINGS[key][-1]), strict=True))
    args = replace(args, **{k: v for k, v in tuned.items() if getattr(args, k) is None})
    may_be_zero = {"seed", "model_ratio", "eval_episodes", "bc_warmup", "kl_weight", "rbc_entropy", "dynamics_weight_decay"}
    may_be_zero |= {"gamma", "target_entropy", "lagrange_gap", "cql_alpha", "dynamics_patience"}
    for name, value in asdict(args).items():
        flag = f"--{name.replace('_', '-')} {value}"
        for v in value if isinstance(value, tuple) else (value,):
            if isinstance(v, (int, float)) and not isinstance(v, bool) and name not in ("target_entropy", "lagrange_gap"):
                if math.isnan(v) or v < 0 or (v == 0 and name not in may_be_zero):
                    raise UserError(f"{flag}: must be {'at least 0' if name in may_be_zero else 'positive'}")
        if name in ("gamma", "tau", "model_ratio", "holdout_ratio") and value > 1:
            raise UserError(f"{flag}: must be at most 1")
    if args.num_elites > args.ensemble_size or len(args.dynamics_weight_decay) != 5:
        raise UserError("--num-elites must not exceed --ensemble-size, --dynamics-weight-decay needs 5 values")
    if args.model_ratio and not 0 < round(args.model_ratio * args.batch_size) <= args.batch_size:
        raise UserError(f"--model-ratio {args.model_ratio}: not one row of a batch of {args.batch_size}; use 0 for plain CQL")
    bc_only = args.model_ratio == 0 and args.bc_warmup >= args.total_updates
    name = args.exp_name or ("bc" if bc_only else "romi_cql" if args.model_ratio else "cql")
    return replace(args, exp_name=name, num_threads=args.num_threads or os.cpu_count())


# --- run folder ---


class Run:
    """Config, metrics, checkpoints and result of one run, in <run-dir>/<task>__<algorithm>__<seed>[__<data source>]."""

    def __init__(self, args, task, data):
        self.args, self.task, self.data = args, task, data
        source = Path(data.path).stem if data.source == "file" else data.source
        suffix = "" if data.source == "d4rl" else f"__{source}"
        self.folder = Path(args.run_dir) / f"{task.slug}__{args.exp_name}__{args.seed}{suffix}"
        self.config = {"args": asdict(args), "task": task.id, "dataset": data.facts(), "versions": versions()}
        self.config |= {"git_commit": git_commit(), "device": str(pick_device(args)), "wandb_id": uuid.uuid4().hex[:8]}
        self.state, self.evals, self.elapsed, self.began, self.wandb = {}, [], 0.0, time.time(), None

    def begin(self):
        """Make the folder or take up the run in it; False if that run is finished."""
        config_file, checkpoint = self.folder / "config.json", self.folder / "checkpoint.pt"
        if config_file.exists():
            old = json.loads(config_file.read_text())
            self.config["wandb_id"] = old["wandb_id"]
            mine = json.loads(json.dumps(self.config))  # tuples become lists, as in the file
            differ = [k for k in mine["args"] if k not in BOOKKEEPING and mine["args"][k] != old["args"].get(k)]
            differ += ["dataset"] if mine["dataset"] != old["dataset"] and "dataset" not in differ else []
            if differ:
                flags = ", ".join(f"--{k.replace('_', '-')}" for k in differ)
                raise UserError(f"{self.folder} holds a run with other settings ({flags}); use another --run-dir or --exp-name")
        if checkpoint.exists():
            self.state = torch.load(checkpoint, map_location="cpu", weights_only=True)
            self.evals, self.elapsed = self.state["evals"], self.state["elapsed"]
            if self.state["phase"] == "policy" and self.state["step"] > self.args.total_updates:
                raise UserError(f"{self.folder} has {self.state['step']} updates already, --total-updates asks for fewer")
        if (self.folder / "result.json").exists():
            result = json.loads((self.folder / "result.json").read_text())
            if result["updates"] >= self.args.total_updates:
                print(f"{self.folder} is finished: normalized score {result['normalized_score']}")
                return False
            (self.folder / "result.json").unlink()  # to be carried on
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(config_file, lambda f: f.write_text(json.dumps(self.config, indent=1) + "\n"))
        self.metrics = open(self.folder / "metrics.jsonl", "a")
        self.metrics.truncate(self.state.get("metrics_bytes", 0))  # lines after the checkpoint will be written again
        if self.state:
            print(f"{self.folder}: resumed in {self.state['phase']}, step {self.state['step']}")
        if self.args.track:
            self.begin_wandb()
        return True

    def begin_wandb(self):
        try:
            import wandb

            names = dict(project=self.args.wandb_project_name, entity=self.args.wandb_entity, name=self.folder.name)
            group = self.args.wandb_group or f"{self.task.slug}__{self.args.exp_name}"
            for mode in (os.environ.get("WANDB_MODE"), "offline"):  # no login or no server: log offline, `wandb sync` later
                try:
                    settings = wandb.Settings(init_timeout=30)
                    self.wandb = wandb.init(
                        **names, group=group, id=self.config["wandb_id"], resume="allow", config=self.config, mode=mode,
                        dir=str(self.folder), settings=settings, tags=[self.task.id, self.args.exp_name, self.data.source],
                    )  # fmt: skip
                    break
                except Exception as e:
                    print(f"W&B: {type(e).__name__}: {str(e)[:100]}; trying offline", file=sys.stderr)
            if self.wandb:
                self.wandb.define_metric("*", step_metric="update")
        except ImportError:
            print("W&B is not installed (pip install wandb); going on without it", file=sys.stderr)

    def log(self, update, metrics):
        """One line of metrics.jsonl; tensors become floats here and nowhere else."""
        row = {"update": update} | {k: float(v) if isinstance(v, torch.Tensor) else v for k, v in metrics.items()}
        bad = [k for k, v in row.items() if k.startswith("losses/") and not math.isfinite(v)]
        if bad:
            where = f"{self.folder / 'checkpoint.pt'} is the last good checkpoint"
            raise UserError(f"{', '.join(bad)} not finite at update {update}; {where}; try a smaller rate", status=3)
        self.metrics.write(json.dumps(row) + "\n")
        self.metrics.flush()
        if self.wandb:
            try:
                self.wandb.log(row)
            except Exception as e:
                print(f"W&B: {type(e).__name__}; going on without it", file=sys.stderr)
                self.wandb = None

    def save(self, phase, step, **parts):
        """Checkpoint; what earlier phases left in it stays unless it is given again (None removes it)."""
        self.state |= parts | {"phase": phase, "step": step, "rng": rng_state(), "evals": self.evals}
        self.state |= {"metrics_bytes": self.metrics.tell(), "elapsed": self.elapsed + time.time() - self.began}
        self.state = {k: v for k, v in self.state.items() if v is not None}
        write_atomically(self.folder / "checkpoint.pt", lambda f: torch.save(self.state, f))

    def finish(self, updates, sps):
        last = self.evals[-1] if self.evals else {}
        scores = [e["score"] for e in self.evals[-10:] if e["score"] is not None]
        result = {
            "task": self.task.id,
            "algorithm": self.args.exp_name,
            "seed": self.args.seed,
            "updates": updates,
            "normalized_score": last.get("score"),
            "normalized_score_last_10": sum(scores) / len(scores) if scores else None,
            "return_mean": last.get("mean"),
            "return_std": last.get("std"),
            "eval_episodes": self.args.eval_episodes,
            "dataset": self.data.facts(),
            "wall_time_s": round(self.elapsed + time.time() - self.began, 1),
            "updates_per_s": round(sps, 2),
            "device": self.config["device"],
            "versions": self.config["versions"],
        }
        write_atomically(self.folder / "result.json", lambda f: f.write_text(json.dumps(result, indent=1) + "\n"))
        if self.wandb:
            self.wandb.summary.update({k: v for k, v in result.items() if not isinstance(v, dict)})
            self.wandb.finish()
        print(f"{self.folder}: normalized score {last.get('score')}, return {last.get('mean')} +- {last.get('std')}")


def write_atomically(path, write):
    part = path.with_name(path.name + ".part")
    write(part)
    os.replace(part, path)


def versions():
    modules = {m.__name__: m.__version__ for m in (torch, np, gymnasium, mujoco)}
    return modules | {"python": platform.python_version()}


def git_commit():
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or None


def pick_device(args):
    have = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    name = ("cuda" if have["cuda"] else "cpu") if args.device == "auto" else args.device
    if not have[name]:
        raise UserError(f"--device {name}: there is none; use --device auto")
    return torch.device(name)


def keep_freed_memory():
    """glibc hands freed blocks back to the system and faults them in again at the next update, a third of an update's time
    on a CPU, and its self-adjusting thresholds let long runs grow by gigabytes. Fixed thresholds cure both."""
    if platform.libc_ver()[0] == "glibc":
        for option, value in ((-3, 32 << 20), (-1, 2**31 - 1), (-2, 64 << 20)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD
            ctypes.CDLL(None).mallopt(option, value)


def rng_state():
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])


def set_rng_state(state):
    torch.set_rng_state(state[0])
    if len(state) > 1 and torch.cuda.is_available():
        torch.cuda.set_rng_state(state[1])


def progress(total, desc, unit, initial=0):
    return tqdm(total=total, initial=initial, desc=desc, unit=unit, mininterval=0.5 if sys.stderr.isatty() else 30)


# --- networks ---


def mlp(sizes, activation=nn.ReLU):
    layers = []
    for n, m in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(n, m), activation(inplace=True)]
    return nn.Sequential(*layers[:-1])


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


class Policy(nn.Module):
    """pi(a|s): tanh-squashed Gaussian, log standard deviation clamped to [-5, 2]."""

    def __init__(self, obs_dim, act_dim, hidden):
        super().__init__()
        self.net = mlp([obs_dim, hidden, hidden, hidden, 2 * act_dim])

    def forward(self, obs):
        """obs (B, O) -> mean and log standard deviation before the tanh, (B, A) each"""
        mean, log_std = self.net(obs).chunk(2, -1)
        return mean, log_std.clamp(-5, 2)


class QFunctions(nn.Module):
    """Q_1(s,a) and Q_2(s,a)."""

    def __init__(self, obs_dim, act_dim, hidden):
        super().__init__()
        self.q1 = mlp([obs_dim + act_dim, hidden, hidden, hidden, 1])
        self.q2 = mlp([obs_dim + act_dim, hidden, hidden, hidden, 1])

    def forward(self, obs, act):
        """obs (..., O), act (..., A) -> (2, ...)"""
        x = torch.cat([obs, act], -1)
        rows = x.flatten(0, -2)  # in-place ReLUs on a matrix; on a view of more dimensions autograd would copy every layer
        return torch.stack([self.q1(rows), self.q2(rows)]).view(2, *x.shape[:-1])


class ReverseVAE(nn.Module):
    """G(a|s'): conditional VAE, encoder E_omega(s', a) and decoder D_xi(s', z)."""

    def __init__(self, obs_dim, act_dim, args):
        super().__init__()
        self.latent_dim, self.args = 2 * act_dim, args
        self.encoder = mlp([obs_dim + act_dim, args.vae_hidden, args.vae_hidden, 2 * self.latent_dim])
        self.decoder = mlp([obs_dim + self.latent_dim, args.vae_hidden, args.vae_hidden, act_dim])

    def loss(self, next_obs, act):
        """Reconstruction error and KL to N(0, I), each a mean over batch and dimensions (ROMI Eq. 3)."""
        mean, log_std = self.encoder(torch.cat([next_obs, act], -1)).chunk(2, -1)
        log_std = log_std.clamp(-4, 15)
        recon = self.decode(next_obs, mean + log_std.exp() * torch.randn_like(mean))
        kl = -0.5 * (1 + 2 * log_std - mean.square() - (2 * log_std).exp()).mean()
        return F.mse_loss(recon, act) + self.args.kl_weight * kl

    def decode(self, next_obs, latent):
        return self.decoder(torch.cat([next_obs, latent], -1)).tanh()

    def sample(self, next_obs):
        """next_obs (B, O) -> (B, A)"""
        latent = torch.randn(len(next_obs), self.latent_dim, device=next_obs.device)
        return self.decode(next_obs, latent.clamp(-self.args.latent_clip, self.args.latent_clip))


class ReverseBC(nn.Module):
    """pi(a|s'): tanh-squashed Gaussian on standardised next observations (ROMI Sec. 4.4)."""

    def __init__(self, obs_dim, act_dim, args):
        super().__init__()
        self.args = args
        self.net = mlp([obs_dim, args.rbc_hidden, args.rbc_hidden, 2 * act_dim])
        self.register_buffer("mean", torch.zeros(obs_dim))
        self.register_buffer("std", torch.ones(obs_dim))

    def forward(self, next_obs):
        mean, log_std = self.net((next_obs - self.mean) / self.std).chunk(2, -1)
        return mean, log_std.clamp(-20, 2)

    def loss(self, next_obs, act):
        """Negative log-likelihood (ROMI Eq. 4), less an entropy bonus if asked for."""
        mean, log_std = self(next_obs)
        return -squashed_log_prob(mean, log_std, act).mean() - self.args.rbc_entropy * log_std.sum(-1).mean()

    def sample(self, next_obs):
        mean, log_std = self(next_obs)
        return squash(mean, log_std, torch.randn_like(mean))[0]


class UniformPolicy(nn.Module):
    """Uniform actions in [-1, 1]^A, for easy tasks (ROMI Sec. 3)."""

    def __init__(self, obs_dim, act_dim, args):
        super().__init__()
        self.act_dim = act_dim

    def sample(self, next_obs):
        return 2 * torch.rand(len(next_obs), self.act_dim, device=next_obs.device) - 1


# --- dynamics model ---


class ReverseDynamics(nn.Module):
    """p(s, r | s', a): E Gaussians over (r, s - s'), each its own network, all in one tensor operation per layer (ROMI Eq. 1)."""

    def __init__(self, obs_dim, act_dim, args):
        super().__init__()
        self.args = args
        sizes = [obs_dim + act_dim] + 4 * [args.dynamics_hidden] + [2 * (obs_dim + 1)]
        pairs = list(zip(sizes, sizes[1:], strict=False))
        self.weight = nn.ParameterList(
            nn.init.trunc_normal_(torch.empty(args.ensemble_size, n, m), std=0.5 / n**0.5, a=-1 / n**0.5, b=1 / n**0.5) for n, m in pairs
        )
        self.bias = nn.ParameterList(torch.zeros(args.ensemble_size, 1, m) for _, m in pairs)
        self.max_logvar = nn.Parameter(torch.full((obs_dim + 1,), 0.5))
        self.min_logvar = nn.Parameter(torch.full((obs_dim + 1,), -10.0))
        self.register_buffer("mean", torch.zeros(obs_dim + act_dim))
        self.register_buffer("std", torch.ones(obs_dim + act_dim))
        self.register_buffer("elites", torch.arange(args.num_elites))

    def inputs(self, next_obs, act):
        return (torch.cat([next_obs, act], -1) - self.mean) / self.std

    def forward(self, x):
        """x (E, B, O+A), standardised -> mean and log-variance of (r, s - s'), (E, B, 1+O) each"""
        last = len(self.weight) - 1
        for i, (w, b) in enumerate(zip(self.weight, self.bias, strict=True)):
            x = torch.baddbmm(b, x, w)
            x = F.silu(x, inplace=False) if i < last else x
        return self.bound(x)

    def member(self, e, x):
        """One member alone: x (B, O+A) -> (B, 1+O), (B, 1+O)"""
        last = len(self.weight) - 1
        for i, (w, b) in enumerate(zip(self.weight, self.bias, strict=True)):
            x = torch.addmm(b[e, 0], x, w[e])
            x = F.silu(x, inplace=True) if i < last else x
        return self.bound(x)

    def bound(self, x):
        mean, logvar = x.chunk(2, -1)
        logvar = self.max_logvar - F.softplus(self.max_logvar - logvar)
        return mean, self.min_logvar + F.softplus(logvar - self.min_logvar)

    def loss(self, x, target):
        """Gaussian negative log-likelihood (times 2, without constants), summed over members (ROMI Eq. 2)."""
        mean, logvar = self(x)
        nll = ((mean - target).square() * (-logvar).exp() + logvar).mean((1, 2)).sum()
        return nll + 0.01 * (self.max_logvar.sum() - self.min_logvar.sum())

    @torch.no_grad()
    def sample(self, next_obs, act):
        """(s, r) ~ p(.|s', a), every row by an elite of its own: (B, O), (B, A) -> (B, O), (B,)"""
        x = self.inputs(next_obs, act)
        chosen = self.elites[torch.randint(len(self.elites), (len(x),), device=x.device)]
        noise = torch.randn(len(x), next_obs.shape[1] + 1, device=x.device)
        out = torch.empty_like(noise)
        for e in self.elites.tolist():
            rows = (chosen == e).nonzero().squeeze(1)
            mean, logvar = self.member(e, x[rows])
            out[rows] = mean + (0.5 * logvar).exp() * noise[rows]
        return next_obs + out[:, 1:], out[:, 0]

    def optimizer(self):
        """Adam's own weight decay adds wd W to the gradient, which is the gradient of the loss term wd/2 |W|^2."""
        groups = [{"params": [w], "weight_decay": wd} for w, wd in zip(self.weight, self.args.dynamics_weight_decay, strict=True)]
        groups.append({"params": [*self.bias, self.max_logvar, self.min_logvar]})
        return torch.optim.Adam(groups, lr=self.args.dynamics_lr, fused=True)


def train_dynamics(dynamics, obs, act, rew, next_obs, args, run):
    """Maximum likelihood until the holdout error of every member has stopped falling (ROMI Alg. 1, l. 2-5)."""
    device, E = obs.device, args.ensemble_size
    # Split and bootstraps come from a generator of their own: a resumed run draws the same ones again.
    split = torch.Generator().manual_seed(args.seed)
    order = torch.randperm(len(obs), generator=split)
    num_holdout = max(1, min(int(args.holdout_ratio * len(obs)), args.holdout_max))
    holdout, train = order[:num_holdout].to(device), order[num_holdout:].to(device)
    if len(train) == 0:
        raise UserError(f"--dataset {args.dataset}: {len(obs)} transitions are too few to train a model")
    bootstrap = torch.randint(len(train), (E, len(train)), generator=split).to(device)
    raw = torch.cat([next_obs, act], -1)
    dynamics.mean.copy_(raw[train].mean(0))
    std = raw[train].std(0, unbiased=False)
    dynamics.std.copy_(torch.where(std < 1e-12, 1.0, std))
    x, y = dynamics.inputs(next_obs, act), torch.cat([rew[:, None], obs - next_obs], -1)
    layers, opt = [*dynamics.weight, *dynamics.bias], dynamics.optimizer()
    epoch, since, best = 0, 0, torch.full((E,), torch.inf, device=device)
    snapshot = [p.detach().clone() for p in layers]
    if "dynamics_training" in run.state:
        saved = run.state["dynamics_training"]
        dynamics.load_state_dict(run.state["dynamics"])
        opt.load_state_dict(saved["opt"])
        epoch, since, best = saved["epoch"], saved["since"], saved["best"].to(device)
        snapshot = [p.to(device) for p in saved["snapshot"]]
        set_rng_state(run.state["rng"])

    @torch.no_grad()
    def holdout_mse():
        mean, _ = dynamics(x[holdout].expand(E, -1, -1))
        return (mean - y[holdout]).square().mean((1, 2))  # (E,)

    loss_fn = torch.compile(dynamics.loss) if args.compile else dynamics.loss
    bar = progress(args.dynamics_max_epochs, "dynamics", "epoch", epoch)
    while since <= args.dynamics_patience and epoch < (args.dynamics_max_epochs or math.inf):
        shuffle = torch.stack([torch.randperm(len(train), device=device) for _ in range(E)])
        rows = train[bootstrap.gather(1, shuffle)]  # (E, N): each member sees its own bootstrap in a new order
        for begin in range(0, len(train), args.dynamics_batch_size):
            idx = rows[:, begin : begin + args.dynamics_batch_size]
            loss = loss_fn(x[idx], y[idx])
            opt.zero_grad()
            loss.backward()
            opt.step()
        mse = holdout_mse()
        improved = (best - mse) / best > 0.01
        improved |= best.isinf() & mse.isfinite()
        best = torch.where(improved, mse, best)
        for kept, p in zip(snapshot, layers, strict=True):
            kept[improved] = p.detach()[improved]
        epoch, since = epoch + 1, 0 if improved.any() else since + 1
        run.log(0, {"model/epoch": epoch, "losses/dynamics": loss.detach(), "model/holdout_mse": mse.mean(), "model/best_mse": best.mean()})
        training = {"opt": opt.state_dict(), "epoch": epoch, "since": since, "best": best, "snapshot": snapshot}
        run.save("dynamics", epoch, dynamics=dynamics.state_dict(), dynamics_training=training)
        bar.set_postfix(holdout_mse=f"{mse.mean():.4g}", best=f"{best.mean():.4g}")
        bar.update()
    bar.close()
    with torch.no_grad():
        for p, kept in zip(layers, snapshot, strict=True):
            p.copy_(kept)
    mse = holdout_mse()
    dynamics.elites.copy_(mse.argsort()[: args.num_elites])
    elite_mse = mse[dynamics.elites]
    print(f"dynamics: {epoch} epochs, elites {dynamics.elites.tolist()}, holdout MSE {elite_mse.mean():.4g}")
    scale = y[holdout].var(0, unbiased=False).mean()
    run.log(0, {"model/epochs": epoch, "model/elite_mse": elite_mse.mean(), "model/elite_mse_over_variance": elite_mse.mean() / scale})


def train_reverse_policy(policy, next_obs, act, args, run):
    """CVAE or RBC on (s', a) of the data (ROMI Alg. 1, l. 6-9)."""
    opt, step = torch.optim.Adam(policy.parameters(), lr=args.reverse_policy_lr, fused=True), 0
    if isinstance(policy, ReverseBC):
        policy.mean.copy_(next_obs.mean(0))
        policy.std.copy_(next_obs.std(0) + 1e-6)
    if run.state["phase"] == "reverse_policy":
        policy.load_state_dict(run.state["reverse_policy"])
        opt.load_state_dict(run.state["reverse_policy_opt"])
        step = run.state["step"]
        set_rng_state(run.state["rng"])
    loss_fn = torch.compile(policy.loss) if args.compile else policy.loss
    bar = progress(args.reverse_policy_updates, f"reverse policy ({args.rollout_policy})", "update", step)
    while step < args.reverse_policy_updates:
        idx = torch.randint(len(act), (args.reverse_policy_batch_size,), device=act.device)
        loss = loss_fn(next_obs[idx], act[idx])
        opt.zero_grad()
        loss.backward()
        opt.step()
        step += 1
        bar.update()
        if step % args.log_every == 0 or step == args.reverse_policy_updates:
            run.log(0, {"model/reverse_policy_update": step, "losses/reverse_policy": loss.detach()})
            bar.set_postfix(loss=f"{loss.item():.4g}")
        if step % args.checkpoint_every == 0:
            run.save("reverse_policy", step, reverse_policy=policy.state_dict(), reverse_policy_opt=opt.state_dict())
    bar.close()


# --- rollout ---


def termination_fn(task, data):
    """(obs, act, next_obs) -> (B,) bool: has the MDP ended with this transition? Gymnasium's own rules for the v4 robots."""

    def hopper(obs, act, next_obs):
        z, angle = next_obs[:, 0], next_obs[:, 1]
        return ~(next_obs.isfinite().all(-1) & (next_obs[:, 1:].abs() < 100).all(-1) & (z > 0.7) & (angle.abs() < 0.2))

    def walker2d(obs, act, next_obs):
        z, angle = next_obs[:, 0], next_obs[:, 1]
        return ~((z > 0.8) & (z < 2.0) & (angle.abs() < 1.0))

    def ant(obs, act, next_obs):
        return ~(next_obs.isfinite().all(-1) & (next_obs[:, 0] >= 0.2) & (next_obs[:, 0] <= 1.0))

    def antmaze(obs, act, next_obs):
        return (next_obs[:, :2] - goal).norm(dim=-1) <= 0.5

    def never(obs, act, next_obs):
        return torch.zeros(len(obs), dtype=torch.bool, device=obs.device)

    if task.domain == "antmaze":  # every rewarded position lies within 0.5 of the goal: its centre, without asking the simulator
        reached = data.next_obs[(data.terminated > 0) & data.has_next, :2]
        if len(reached) == 0:
            reached = data.obs[data.terminated > 0, :2]
        goal = (reached.amax(0) + reached.amin(0)).to(obs_device(data)) / 2
    return {"hopper": hopper, "walker2d": walker2d, "ant": ant, "antmaze": antmaze}.get(task.domain, never)


def pack(obs, act, rew, next_obs, terminated):
    """Transitions as rows of one matrix, so that a batch is one index operation: (B, 2 O + A + 2)"""
    return torch.cat([obs, act, rew[:, None], next_obs, terminated[:, None].float()], -1)


def unpack(rows, obs_dim, act_dim):
    obs, act, rew, next_obs, terminated = rows.split([obs_dim, act_dim, 1, obs_dim, 1], -1)
    return obs, act, rew.squeeze(-1), next_obs, terminated.squeeze(-1)


def priority_weights(returns):
    """(N,) trajectory returns -> (N,) weights in [0, 1]; the worst trajectory gets 0 (wenzhe-li/romi, dataset_processor.py)."""
    return (returns - returns.min()) / (returns.max() - returns.min()).clamp(min=1)


class Sampler:
    """Row numbers 0 .. n-1, uniform or in exact proportion to weights (uniform if all weights are 0)."""

    def __init__(self, n, weights=None, device="cpu"):
        self.n, self.device = n, device
        self.cdf = weights.double().cumsum(0).to(device) if weights is not None and weights.sum() > 0 else None

    def __call__(self, size):
        if self.cdf is None:
            return torch.randint(self.n, (size,), device=self.device)
        u = torch.rand(size, dtype=self.cdf.dtype, device=self.device) * self.cdf[-1]
        return torch.searchsorted(self.cdf, u, right=True).clamp_(max=self.n - 1)  # right: a row of weight 0 has no u


@torch.no_grad()
def imagine(starts, dynamics, reverse_policy, terminates, sampler, args, run):
    """Reverse rollouts from rows of `starts` (N, O) until the buffer is full (ROMI Alg. 1, l. 10-14): (M, 2 O + A + 2)"""
    O, A = starts.shape[1], dynamics.mean.shape[0] - starts.shape[1]
    buffer = torch.empty(args.model_buffer_size, 2 * O + A + 2, device=starts.device)
    filled = calls = cut_at_once = 0
    low, high = run.reward_range
    bar = progress(args.model_buffer_size, "imagination", "row")
    while filled < args.model_buffer_size:
        next_obs = starts[sampler(args.rollout_batch_size)]
        calls += 1
        for step in range(args.horizon):
            act = reverse_policy.sample(next_obs)  # a_t ~ G(.|s_t+1)
            obs, rew = dynamics.sample(next_obs, act)  # s_t, r_t ~ p(.|s_t+1, a_t)
            rew = rew.clamp(low, high) if args.clip_rewards else rew
            terminated = terminates(obs, act, next_obs)  # about the given end of the transition, not the imagined begin
            rows = pack(obs, act, rew, next_obs, terminated)[: args.model_buffer_size - filled]
            buffer[filled : filled + len(rows)] = rows
            filled += len(rows)
            cut_at_once += int(terminated.sum()) if step == 0 else 0
            next_obs = obs[~terminated & obs.isfinite().all(-1)]  # one step back in time; a chain that ended stays ended
        bar.update(filled - bar.n)
    bar.close()
    _, _, rew, _, terminated = unpack(buffer, O, A)
    stats = {"reward_min": rew.min(), "reward_max": rew.max(), "reward_mean": rew.mean(), "terminated": terminated.mean()}
    stats |= {"cut_at_step_1": cut_at_once / (calls * args.rollout_batch_size)}
    run.log(0, {f"model/imagined_{k}": v for k, v in stats.items()} | {"model/data_reward_min": low, "model/data_reward_max": high})
    return buffer


# --- learner ---


def conservative_penalty(q_data, q_sampled, log_density, temperature=1.0):
    """CQL(H): log sum_a exp Q(s,a), by importance sampling over the 3N actions, minus Q on the rows' own actions (CQL Eq. 4).

    q_data (2, B), q_sampled (2, B, 3N), log_density (B, 3N) of the distribution that each action came from -> (2, B)
    """
    assert q_sampled.shape == (*q_data.shape, log_density.shape[-1])
    return temperature * torch.logsumexp(q_sampled / temperature - log_density, -1) - q_data


class CQL:
    """CQL(H) on top of SAC, without entropy in the backup (wenzhe-li/romi, CQL/d4rl)."""

    def __init__(self, obs_dim, act_dim, args, device):
        self.args, self.act_dim, self.device = args, act_dim, device
        self.policy = Policy(obs_dim, act_dim, args.hidden).to(device)
        self.qf = QFunctions(obs_dim, act_dim, args.hidden).to(device)
        self.target_qf = QFunctions(obs_dim, act_dim, args.hidden).to(device).requires_grad_(False)
        self.target_qf.load_state_dict(self.qf.state_dict())
        self.log_alpha = nn.Parameter(torch.zeros((), device=device))
        self.log_cql_alpha = nn.Parameter(torch.tensor(math.log(max(args.cql_alpha, 1e-8)), device=device))
        self.target_entropy = -float(act_dim) if args.target_entropy is None else args.target_entropy
        adam = dict(fused=True, capturable=device.type == "cuda")
        self.policy_opt = torch.optim.Adam(self.policy.parameters(), lr=args.policy_lr, **adam)
        self.alpha_opt = torch.optim.Adam([self.log_alpha], lr=args.policy_lr, **adam)
        self.qf_opt = torch.optim.Adam(self.qf.parameters(), lr=args.qf_lr, **adam)
        self.cql_alpha_opt = torch.optim.Adam([self.log_cql_alpha], lr=args.qf_lr, **adam)
        if args.compile:
            torch._inductor.config.fallback_random = True  # the random numbers of eager mode
            mode = "reduce-overhead" if device.type == "cuda" else None
            self.policy_loss = torch.compile(self.policy_loss, mode=mode)
            self.critic_loss = torch.compile(self.critic_loss, mode=mode)

    def policy_loss(self, obs, act, alpha, warm_up: bool):
        """SAC's policy objective; while warming up the likelihood of the batch's actions takes the place of Q."""
        mean, log_std = self.policy(obs)
        new_act, log_prob = squash(mean, log_std, torch.randn_like(mean))
        gain = squashed_log_prob(mean, log_std, act) if warm_up else self.qf(obs, new_act).amin(0)
        return (alpha * log_prob - gain).mean(), log_prob.detach()

    def critic_loss(self, obs, act, rew, next_obs, terminated):
        """TD error on the mix of real and imagined rows plus the conservative penalty (CQL Eq. 4)."""
        B, N, A = len(obs), self.args.cql_samples, self.act_dim
        with torch.no_grad():
            mean, log_std = self.policy(torch.cat([obs, next_obs]))  # (2B, A)
            mean, log_std = mean.unsqueeze(1), log_std.unsqueeze(1)
            sampled, log_prob = squash(mean, log_std, torch.randn(2 * B, N + 1, A, device=obs.device))  # (2B, N+1, A), (2B, N+1)
            next_q = self.target_qf(next_obs, sampled[B:, N]).amin(0)  # (B,)
            target_q = rew + self.args.gamma * (1 - terminated) * next_q  # no entropy in the backup
            uniform = 2 * torch.rand(B, N, A, device=obs.device) - 1
            # N uniform actions, N of pi(.|s) and N of pi(.|s'); the last are one more proposal, evaluated at s too
            sampled_act = torch.cat([uniform, sampled[:B, :N], sampled[B:, :N]], 1)  # (B, 3N, A)
            log_density = torch.cat([torch.full((B, N), A * math.log(0.5), device=obs.device), log_prob[:B, :N], log_prob[B:, :N]], 1)
        q = self.qf(obs, act)  # (2, B)
        td_loss = (q - target_q).square().mean(1).sum()  # CQL Eq. 4 has a factor 1/2 here, code has not
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=self.args.bf16):
            q_sampled = self.qf(obs.unsqueeze(1).expand(-1, 3 * N, -1), sampled_act)  # (2, B, 3N)
        penalty = conservative_penalty(q, q_sampled.float(), log_density, self.args.cql_temperature).mean(1).sum()
        return td_loss, penalty, q.detach().mean(), q_sampled.detach().float().mean(), target_q.mean()

    def update(self, obs, act, rew, next_obs, terminated, warm_up, bc_only=False):
        """One update of temperature, policy, Q functions and targets, in the reference's order; metrics as tensors."""
        if self.args.compile:
            torch.compiler.cudagraph_mark_step_begin()
        alpha = self.log_alpha.detach().exp()
        policy_loss, log_prob = self.policy_loss(obs, act, alpha, warm_up)
        alpha_loss = -self.log_alpha * (log_prob.mean() + self.target_entropy)
        self.policy_opt.zero_grad()
        policy_loss.backward(inputs=list(self.policy.parameters()))  # the Q functions get no gradient from this loss
        self.policy_opt.step()
        self.alpha_opt.zero_grad()
        alpha_loss.backward()
        self.alpha_opt.step()
        metrics = {"losses/policy": policy_loss.detach(), "q/entropy": -log_prob.mean(), "q/alpha": alpha}
        if bc_only:
            return metrics

        td_loss, penalty, q_data, q_sampled, target_q = self.critic_loss(obs, act, rew, next_obs, terminated)
        cql_alpha = self.args.cql_alpha
        if self.args.lagrange:
            cql_alpha = self.log_cql_alpha.detach().exp().clamp(max=1e6)
            self.cql_alpha_opt.zero_grad()
            (-self.log_cql_alpha.exp() * (penalty.detach() - 2 * self.args.lagrange_gap)).backward()
            self.cql_alpha_opt.step()
        self.qf_opt.zero_grad()
        (td_loss + cql_alpha * penalty).backward()
        self.qf_opt.step()
        torch._foreach_lerp_(list(self.target_qf.parameters()), list(self.qf.parameters()), self.args.tau)
        metrics |= {"losses/td": td_loss.detach(), "losses/conservative": penalty.detach()}
        return metrics | {"q/data": q_data, "q/sampled": q_sampled, "q/target": target_q}

    @torch.no_grad()
    def act(self, obs):
        """obs (B, O) -> deterministic actions (B, A), on the CPU"""
        return self.policy(obs.to(self.device))[0].tanh().cpu()

    MODULES = ("policy", "qf", "target_qf", "policy_opt", "alpha_opt", "qf_opt", "cql_alpha_opt")

    def state_dict(self):
        alphas = {"log_alpha": self.log_alpha.detach(), "log_cql_alpha": self.log_cql_alpha.detach()}
        return {k: getattr(self, k).state_dict() for k in self.MODULES} | alphas

    def load_state_dict(self, state):
        for k in self.MODULES:
            getattr(self, k).load_state_dict(state[k])
        self.log_alpha.data.copy_(state["log_alpha"])
        self.log_cql_alpha.data.copy_(state["log_cql_alpha"])


# --- main ---


def main(args):
    task = parse_task(args.env)
    args = resolve(args, task)
    device = pick_device(args)
    data = load_dataset(task, args.dataset)
    envs = [make_env(task) for _ in range(args.eval_episodes)]
    run = Run(args, task, data)
    if not run.begin():
        return
    torch.set_num_threads(args.num_threads)
    keep_freed_memory()
    random.seed(args.seed)
    np.random.seed(args.seed)
    obs_dim, act_dim = data.obs.shape[1], data.act.shape[1]
    rows = pack(data.obs, data.act, data.rew, data.next_obs, data.terminated).to(device)
    weights = priority_weights(data.trajectory_returns())
    real = Sampler(len(data), weights if args.priority_policy else None, device)

    # Every phase begins with a seed of its own: plain CQL and ROMI-CQL start from the same networks, and a resumed run
    # makes the imagined data again instead of reading gigabytes.
    if args.model_ratio > 0:
        imagined = model_phases(task, data, args, device, run)
    torch.manual_seed(4 * args.seed + 3)
    agent = CQL(obs_dim, act_dim, args, device)
    step = 0
    if "agent" in run.state:
        agent.load_state_dict(run.state["agent"])
        step = run.state["step"]
        set_rng_state(run.state["rng"])
    num_model = round(args.model_ratio * args.batch_size)
    bc_only = args.model_ratio == 0 and args.bc_warmup >= args.total_updates
    bar = progress(args.total_updates, args.exp_name, "update", step)
    began, began_step, last_log, score, sps = time.time(), step, (time.time(), step), None, 0.0
    while step < args.total_updates:
        batch = rows[real(args.batch_size - num_model)]
        if num_model:
            batch = torch.cat([batch, imagined[torch.randint(len(imagined), (num_model,), device=device)]])
        metrics = agent.update(*unpack(batch, obs_dim, act_dim), step < args.bc_warmup, bc_only)
        step += 1
        bar.update()
        last = step == args.total_updates
        if step % args.log_every == 0 or last:
            now = time.time()
            sps, last_log = (step - last_log[1]) / (now - last_log[0]), (now, step)
            run.log(step, metrics | {"charts/SPS": sps})
            bar.set_postfix({k.split("/")[1]: f"{v:.3g}" for k, v in metrics.items() if k in ("losses/td", "q/data")}, score=score)
        if args.eval_episodes and (step % args.eval_every == 0 or last):
            returns, lengths = evaluate(envs, agent.act, seed=args.seed + 100)
            score = normalized_score(task, returns.mean())
            run.evals.append({"update": step, "score": score, "mean": returns.mean().item(), "std": returns.std().item()})
            names = {"return": returns.mean().item(), "return_std": returns.std().item(), "length": lengths.mean().item()}
            run.log(step, {f"eval/{k}": v for k, v in names.items()} | {"eval/normalized_score": score})
        if step % args.checkpoint_every == 0 or last:
            run.save("policy", step, agent=agent.state_dict())
    bar.close()
    run.finish(step, (step - began_step) / max(time.time() - began, 1e-9) if step > began_step else sps)


def model_phases(task, data, args, device, run):
    """Reverse model, reverse policy, imagination (ROMI Alg. 1, l. 2-14), each taken up where the checkpoint left it."""
    run.reward_range = float(data.rew.min()), float(data.rew.max())
    obs_dim, act_dim = data.obs.shape[1], data.act.shape[1]
    known = data.has_next  # rows without a true successor teach a model nothing but resets
    obs, act, rew, next_obs = (x[known].to(device) for x in (data.obs, data.act, data.rew, data.next_obs))
    torch.manual_seed(4 * args.seed)
    dynamics = ReverseDynamics(obs_dim, act_dim, args).to(device)
    if run.state.get("phase", "dynamics") == "dynamics":
        train_dynamics(dynamics, obs, act, rew, next_obs, args, run)
        torch.manual_seed(4 * args.seed + 1)
        run.save("reverse_policy", 0, dynamics=dynamics.state_dict(), dynamics_training=None)
    dynamics.load_state_dict(run.state["dynamics"])

    torch.manual_seed(4 * args.seed + 1)
    reverse_policy = {"cvae": ReverseVAE, "rbc": ReverseBC, "uniform": UniformPolicy}[args.rollout_policy](obs_dim, act_dim, args)
    reverse_policy.to(device)
    if run.state["phase"] == "reverse_policy" and args.rollout_policy != "uniform":
        train_reverse_policy(reverse_policy, next_obs, act, args, run)
    if run.state["phase"] == "reverse_policy":
        run.save("policy", 0, reverse_policy=reverse_policy.state_dict(), reverse_policy_opt=None)
    reverse_policy.load_state_dict(run.state["reverse_policy"])

    torch.manual_seed(4 * args.seed + 2)
    weights = priority_weights(data.trajectory_returns())
    starts = Sampler(len(data), weights if args.priority_rollout else None, device)
    terminates = termination_fn(task, data)
    return imagine(data.obs.to(device), dynamics, reverse_policy, terminates, starts, args, run)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except UserError as e:
        sys.exit(e.report())
    except KeyboardInterrupt:
        print("interrupted; the same command resumes from the last checkpoint", file=sys.stderr)
        sys.exit(130)
