"""SRA-AWAC: offline imitation with self-paced reverse augmentation, AWAC as the learner.

There are no rewards: a few expert trajectories D^E say what is good, a large supplementary data set D^S what is possible.

Papers: Shao et al. 2024, arXiv:2406.12550 (SRA); Nair et al. 2020, arXiv:2006.09359 (AWAC). Reference code:
sh-jj/SRA-KDD-2024, and tinkoff-ai/CORL for the learner. SRA is known to us from the authors' KDD slides: lines are those of
Algorithm 1 ("Overall Algorithm"), equations stand under "How to build Reverse Models?" and "How to generate reverse
trajectories?". Files are the code's, the learner's CORL's.

  reverse model    s = T(s', a), mean of 7 networks          squared error on D^E u D^S             l. 1-3   DynamicsModel.py
  reverse policy   pi_r(a|s'): uniform, or a CVAE            variational bound on D^E u D^S         l. 4-6   ReverseBC.py
  confidence       Conf(s) = pi(E[a|s] | s)                  the policy's density at its mean action
  goals            G = {s : Conf(s) > c} u D^E               c: of expert states, a quantile or,    l. 8     sra_iql.py
                                                             as on the slides, the mean (Eq. 4)
  augmentation     s' ~ G, a ~ pi_r(.|s'), s = T(s', a)      h steps back from the goals (Eq. 2),   l. 9     ReverseAugmentation.py
                   D^R: kept with weights 1 / Conf(s)        where the policy is unsure (Eq. 5)     l. 10
  labels           reward 1 on D^E, 0 on D^S and D^R         as UDS does                            l. 11    sra_iql.py
  learner          Q: (Q_j - r - gamma min_k Q'_k(s', a'))^2   a' ~ pi(.|s')                       AWAC          awac.py
                   pi: -E_DE[log pi] - E[w log pi]             w = min(exp(A / lambda), 100),
                                                               A = min_j Q_j(s, a) - min_j Q_j(s, a~), a~ ~ pi(.|s)

    python algorithms/sra_awac.py --env maze2d-umaze
    python algorithms/sra_awac.py --env maze2d-umaze --model-ratio 0     # no augmentation: UDS + AWAC + BC, the control
    python algorithms/sra_awac.py --env maze2d-umaze --model-ratio 0 --bc-weight 0 --exp-name uds_awac_plain     # UDS + AWAC alone
    python algorithms/sra_awac.py --env maze2d-umaze --expert-dataset my_demonstrations.npz

Half of a batch is expert rows; of the other half a share eta is D^R (70 % of it from earlier rounds, 30 % from the last one)
and the rest D^S. Where slides and code disagree we follow the code. Four repairs, without which the code does not do what it says:
  1. Batches are split exactly; the code loses a row to rounding (76 + 179 of 256 rows).
  2. The first round starts at confident supplementary states as well; there the code draws expert states only (a tuple slip).
  3. Mazes are augmented from the first update, every 50 000. The code's warm-up of 200 000 covers their whole run, which then
     divides by 0 rounds; its script's 20 000 from one round to the next does not fit the slides, which show D^R after 0, 50 000,
     100 000 and 150 000 updates.
  4. The weights 1 / (Conf + 1e-5) are computed from log Conf, which overflows nowhere.
Further differences from the code:
  5. The best epoch of each network is kept as a copy; the code keeps a reference to the live weights, so always the last epoch.
  6. Rows before a time limit are used where their successor is recorded; the code drops the last two rows of an episode that a time
     limit ends. Both drop terminal rows: every task is treated as endless, and no rollout terminates.
  7. Start states are split exactly over a whole step of a round, not in draws of 2 000. Kept rows are drawn without
     replacement by the largest keys log w + Gumbel noise, which has the distribution of the code's draws one by one.
  8. Given actions are clipped to 1 - 1e-6 before their density is taken, not 1 - 1e-7. The density at the mean action is exact. The
     code sends the mean through the clipped tanh: beyond a mean of about 8.3 its log Conf falls by hundreds to thousands, so that
     states of saturated actions count as unsure there, and as the surest here.
  9. The number of rounds is that of the rounds that happen, where --rollout-every does not divide the updates after the warm-up.
 10. When the warm-up ends, only the data change. The code reseeds there; where an earlier run has left the weights of its warm-up,
     it begins with these, with Q as its own target and a new cosine.
 11. "Earlier rounds" are earlier rounds. In the code the last one is among them (an object that is changed while shared), which
     takes its share in round k from 0.3 to 0.3 + 0.7 / k; the same slip makes new goals earlier ones among the start states.
 12. Differences from the slides that the code has, too: 90 % of the start states are expert states and 10 % confident ones
     (there one set G), of which there are at most 10 for every expert state; every step is resampled, from 2 candidates a row that
     is kept, and the next step goes back from kept ones (there once, when the trajectories are made); the model minimises a squared
     error, not a likelihood; half of every batch is expert rows, which the policy clones. --threshold mean changes the threshold
     and drops the cap, no more.

SRA with AWAC stands in the slides' Table 4, but its settings and source are unpublished (the authors' repository has the source of
IQL only, of the others byte code, which we did not read). What follows is ours. All that is not the learner is as in sra_iql.py:
labels, halves of a batch, widths, rates with drop and cosine, weight decay, eta, h, rounds, and the cloning of the expert half with
weight 1 (--bc-weight 0: without).
 13. The policy is the tanh-squashed Gaussian of sra_iql.py, whose standard deviation depends on the state: confidence is its
     density, which is the same in all states with CORL's, a Gaussian with one standard deviation for all of them.
 14. lambda is CORL's: 0.1 on mazes, 0.3333 on hopper, halfcheetah and walker2d, 1, its default, on ant and all others (CORL has 0.1
     on antmaze and adroit). It goes with the scale of rewards, which are labels here, 0 or 1, of expert rows, not of the goal. Q is
     at most 1 / (1 - gamma) = 100: in the log q/largest shows whether it stays there for the batch's actions, q/largest_target for
     the policy's.
 15. 2 hidden layers, CORL has 3. CORL's AWAC has no weight decay, the authors' one of 1e-4 on the policy. The loss of Q is the mean
     of both errors, CORL's the sum: Adam adds the decay to the gradient, so that the sum would halve it beside IQL's.
 16. The clip of the weights at 100 and the smaller of two Q functions are CORL's. Log standard deviations are clamped to [-5, 2],
     there to [-20, 2]; actions are squashed, there clipped. Constant rates of 3e-4, 256 rows of one data set and a million updates
     are CORL's, not ours.
E[a|s] is taken as the tanh of the mean, as in the code. The mean is clamped to +-9, which bounds the confidence of saturated actions.
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
from utils import UserError, evaluate, load_dataset, load_expert, make_env, normalized_score, parse_task


@dataclass
class Args:
    # --- experiment ---
    env: Annotated[str, tyro.conf.arg(aliases=["--env-id"])] = "maze2d-umaze"  # D4RL task (version optional) or Minari id
    exp_name: str | None = None  # None: sra_awac; uds_awac without imagined data
    seed: int = 0
    total_updates: int | None = None  # gradient updates of the learner; None: the task's value
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
    expert_dataset: str = "auto"  # auto (the expert's data set, on a maze the planner's), a Minari id, or the path of an HDF5 or npz file
    expert_trajectories: int = 5  # the first so many of them
    eval_every: int = 5_000  # updates
    eval_episodes: int = 30  # per evaluation, with greedy actions; 0: never touch the simulator

    # --- dynamics ---
    ensemble_size: int = 7  # members of the model
    dynamics_layers: Annotated[tuple[int, ...], tyro.conf.arg(aliases=["--dynamics-hidden"])] = (1024, 1024)  # widths
    dynamics_bf16: bool = False  # bfloat16 in the model's hidden layers; their weights, first and last layer and loss stay float32
    dynamics_optimizer: Literal["sgd", "adam"] = "sgd"  # sgd: with Nesterov momentum 0.9, as the reference code
    dynamics_learning_rate: float | None = None  # None: 1e-4 (sgd), 1e-3 (adam)
    dynamics_clip: float = 1.0  # largest norm of a member's gradient
    dynamics_batch_size: int = 256
    dynamics_epochs: Annotated[int, tyro.conf.arg(aliases=["--dynamics-max-epochs"])] = 20  # each member keeps its best
    dynamics_from: str | None = None  # folder of another run whose model is taken: same data, seed and settings, so the same model

    # --- rollout (None: the task's value, SETTINGS below) ---
    horizon: int | None = None  # imagined steps per start state (h); None: by task
    model_ratio: float | None = None  # share of imagined rows in a batch's supplementary half (eta); 0: the base learner; None: by task
    rollout_policy: Literal["cvae", "uniform"] | None = None  # reverse policy: which actions are imagined; None: by task
    warmup: int | None = None  # updates before the first round of augmentation
    rollout_every: int = 50_000  # updates from one rollout to the next
    augmented_rows: Annotated[int, tyro.conf.arg(aliases=["--model-buffer-size"])] = 4_000_000  # imagined transitions of all rounds
    rollout_rows: int | None = None  # imagined transitions of one round; None: an equal share
    rollout_batch_size: int = 2_000  # start states per call; the distribution does not depend on it
    oversampling: int = 2  # imagined transitions for each one that is kept
    threshold: Literal["quantile", "mean"] = "quantile"  # of the expert states' confidence, from which on other states are goals
    threshold_quantile: float = 0.8
    goal_cap: int = 10  # at most so many such states for every expert state, the most confident; not with the mean
    expert_starts: float = 0.9  # share of the rollouts that start at expert states
    new_ratio: float = 0.3  # share of the last round in imagined rows and in start states that are not the expert's
    rollout_policy_updates: int = 200_000  # of the learnt rollout policy
    rollout_policy_batch_size: int = 256
    rollout_policy_lr: float = 1e-3
    vae_hidden: int = 750  # width of the 2 hidden layers of encoder and decoder
    kl_weight: float = 0.5  # of the mean KL; the paper's unit weight in summed form would be 2
    latent_clip: float = 0.5  # sampled latents are clipped to +- this; inf as in the paper

    # --- learner ---
    batch_size: int = 512  # real and imagined rows together
    gamma: float = 0.99  # discount
    tau: float = 0.005  # rate of the target networks
    hidden: tuple[int, ...] = (256, 256)  # widths of the hidden layers of policy and Q functions
    learning_rate: float | None = None  # of all networks of the learner; None: the task's value
    learning_rate_drop: int | None = None  # update at which it falls to a tenth, 0: never; None: half-way on mazes, else never
    cosine_updates: int = 500_000  # in which a cosine takes the policy's rate to 0, whatever the number of updates; 0: constant
    weight_decay: float = 5e-3  # Adam's own, which adds it to the gradient, of all weights and biases
    temperature: float | None = None  # of the advantage weights (lambda); None: the task's value
    bc_weight: float = 1.0  # of the cloning of expert rows; 0: none, the plain learner


# Updates, learning rate, eta, h, reverse policy, warm-up: sh-jj/SRA-KDD-2024, sra_iql_maze.sh (its warm-up: repair 3) and
# sra_iql_mujoco.sh (robots' *-medium; other data of theirs: ours); lambda: CORL, configs/offline/awac. The longest key that fits counts.
SETTINGS = {
    "maze2d-umaze": (200_000, 1e-3, 0.7, 5, "uniform", 0, 0.1),  # dense rewards, here and below: ours, as sparse
    "maze2d": (200_000, 1e-3, 0.5, 5, "uniform", 0, 0.1),
    "hopper": (500_000, 1e-4, 0.5, 5, "uniform", 200_000, 0.3333),
    "halfcheetah": (500_000, 1e-4, 0.1, 1, "cvae", 200_000, 0.3333),
    "walker2d": (500_000, 1e-4, 0.1, 1, "cvae", 200_000, 0.3333),
    "ant": (500_000, 1e-4, 0.1, 1, "cvae", 200_000, 1.0),
    "": (500_000, 1e-4, 0.1, 1, "cvae", 200_000, 1.0),  # ours: any other environment
}
# Flags that change no update (the number of threads only its rounding): a run may be carried on with other values of them.
BOOKKEEPING = {"run_dir", "checkpoint_every", "log_every", "num_threads", "total_updates", "track", "device", "dynamics_from"}
BOOKKEEPING |= {"wandb_project_name", "wandb_entity", "wandb_group"}
BOOKKEEPING |= {"dataset", "expert_dataset"}  # their contents count, not how they were asked for
ADDED = {"bf16", "dynamics_bf16"}  # flags younger than the first runs: one that was begun without them goes on with the default
MAY_BE_ZERO = {"seed", "model_ratio", "eval_episodes", "kl_weight", "gamma", "warmup", "rollout_rows", "threshold_quantile"}
MAY_BE_ZERO |= {"expert_starts", "new_ratio", "learning_rate_drop", "cosine_updates", "weight_decay", "bc_weight"}
AT_MOST_1 = {"gamma", "tau", "model_ratio", "threshold_quantile", "expert_starts", "new_ratio"}


def resolve(args, task):
    """The arguments with the task's settings where the user left None; UserError for what cannot work."""
    key = max((k for k in SETTINGS if f"{task.domain}-{task.kind}".startswith(k)), key=len)
    updates, rate, ratio, horizon, policy, warmup, temperature = SETTINGS[key]
    tuned = dict(total_updates=updates, learning_rate=rate, horizon=horizon, rollout_policy=policy, warmup=warmup)
    tuned |= {"model_ratio": ratio, "temperature": temperature}
    tuned |= {"dynamics_learning_rate": 1e-4 if args.dynamics_optimizer == "sgd" else 1e-3}
    args = replace(args, **{k: v for k, v in tuned.items() if getattr(args, k) is None})
    rounds = max(0, -(-(args.total_updates - args.warmup) // max(1, args.rollout_every))) if args.model_ratio > 0 else 0
    tuned = {"learning_rate_drop": args.total_updates // 2 if task.domain == "maze2d" else 0}
    tuned |= {"rollout_rows": args.augmented_rows // rounds if rounds else 0}
    args = replace(args, **{k: v for k, v in tuned.items() if getattr(args, k) is None})
    for name, value in asdict(args).items():
        for v in value if isinstance(value, tuple) else (value,):
            flag = f"--{name.replace('_', '-')} {v}"
            if type(v) is float and not math.isfinite(v) and not (name == "latent_clip" and v > 0):
                raise UserError(f"{flag}: must be a finite number")
            if type(v) in (int, float):
                if v < 0 or (v == 0 and name not in MAY_BE_ZERO):
                    raise UserError(f"{flag}: must be {'at least 0' if name in MAY_BE_ZERO else 'positive'}")
                if v > 1 and name in AT_MOST_1:
                    raise UserError(f"{flag}: must be at most 1")
    if 0 < args.cosine_updates < args.total_updates:
        raise UserError(f"--total-updates {args.total_updates}: the policy stands still after --cosine-updates {args.cosine_updates}")
    if args.batch_size % 2:
        raise UserError(f"--batch-size {args.batch_size}: must be even, half of a batch is expert rows")
    if args.model_ratio > 0 and round(args.model_ratio * args.batch_size / 2) == 0:
        raise UserError(f"--model-ratio {args.model_ratio}: not one row of a batch of {args.batch_size}; 0 switches the model off")
    if rounds and args.rollout_rows < args.horizon:
        raise UserError(f"--rollout-rows {args.rollout_rows}: a round of {args.horizon} steps needs a row for each; see --augmented-rows")
    if args.model_ratio > 0 and not rounds:
        print(f"note: --warmup {args.warmup} covers all {args.total_updates} updates: nothing is imagined", file=sys.stderr)
    name = "sra_awac" if rounds else "uds_awac"
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


class Normalizer(nn.Module):
    """States standardised with mean and standard deviation (plus 1e-3) of all data; everything but the environment sees these."""

    def __init__(self, obs):
        super().__init__()
        self.register_buffer("mean", obs.mean(0))
        self.register_buffer("std", obs.std(0, unbiased=False) + 1e-3)

    def forward(self, obs):
        return (obs - self.mean) / self.std

    def inverse(self, obs):
        return obs * self.std + self.mean


class ClampedPolicy(nn.Module):
    """pi(a|s): tanh-squashed Gaussian, mean clamped to +-9, log standard deviation to [-5, 2]."""

    def __init__(self, obs_dim, act_dim, hidden):
        super().__init__()
        self.net = mlp(obs_dim, *hidden, 2 * act_dim)

    def forward(self, obs):
        """obs (B, O) -> mean and log standard deviation before the tanh, (B, A) each"""
        mean, log_std = self.net(obs).chunk(2, -1)
        return mean.clamp(-9, 9), log_std.clamp(-5, 2)

    @torch.no_grad()
    def log_confidence(self, obs):
        """log Conf(s) = log pi(tanh(mean) | s): (B, O) -> (B,)"""
        outputs = (self(chunk) for chunk in obs.split(10_000))
        return torch.cat([squash(mean, log_std, torch.zeros_like(mean))[1] for mean, log_std in outputs])


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


class UniformPolicy(nn.Module):
    """Uniform on [-1, 1]^A, "an extremely diverse policy in easy tasks" (ROMI Sec. 3)."""

    def __init__(self, obs_dim, act_dim, args):
        super().__init__()
        self.sample = lambda cond: 2 * torch.rand(len(cond), act_dim, device=cond.device) - 1


# --- dynamics model ---


class ReverseDynamics(nn.Module):
    """s = T(s', a): E networks with ReLU that predict s - s', one tensor operation per layer; together they predict their mean."""

    def __init__(self, obs_dim, act_dim, args):
        super().__init__()
        self.args, sizes = args, (obs_dim + act_dim, *args.dynamics_layers, obs_dim)
        self.weight, self.bias = nn.ParameterList(), nn.ParameterList()
        for n, m in zip(sizes, sizes[1:], strict=False):  # PyTorch's default initialisation, as the reference code
            self.weight.append(torch.empty(args.ensemble_size, n, m).uniform_(-(n**-0.5), n**-0.5))
            self.bias.append(torch.empty(args.ensemble_size, 1, m).uniform_(-(n**-0.5), n**-0.5))

    def forward(self, x):
        """x (E, B, O+A) -> (E, B, O)"""
        last = len(self.weight) - 1
        for i, (w, b) in enumerate(zip(self.weight, self.bias, strict=True)):
            layer = (b, x, w)
            if self.args.dynamics_bf16:
                layer = [t.to(torch.bfloat16 if 0 < i < last else torch.float32) for t in layer]
            x = torch.baddbmm(*layer)
            x = F.relu_(x) if i < last else x
        return x

    @torch.no_grad()
    def predict(self, next_obs, act):
        """s of s' and a: (B, O), (B, A) -> (B, O)"""
        x = torch.cat([next_obs, act], -1)
        return next_obs + self(x.expand(self.args.ensemble_size, -1, -1)).mean(0)

    def optimizer(self):
        lr = self.args.dynamics_learning_rate
        if self.args.dynamics_optimizer == "adam":
            return torch.optim.Adam(self.parameters(), lr=lr, fused=True)
        return torch.optim.SGD(self.parameters(), lr=lr, momentum=0.9, nesterov=True, fused=True)


def clip_member_gradients(parameters, largest):
    """Scale the gradient of each member (first axis of every tensor) down to the given norm."""
    norm = torch.stack([p.grad.flatten(1).norm(dim=1) for p in parameters]).norm(dim=0)  # (E,)
    scale = (largest / (norm + 1e-6)).clamp(max=1)[:, None, None]
    for p in parameters:
        p.grad.mul_(scale)


def train_reverse_dynamics(dynamics, obs, act, next_obs, args, run):
    """Squared error on all rows; every member, in an order of its own, keeps its best epoch."""
    device, E, parameters = obs.device, args.ensemble_size, list(dynamics.parameters())
    x, y = torch.cat([next_obs, act], -1), obs - next_obs
    opt, epoch = dynamics.optimizer(), 0
    snapshot, best = [p.detach().clone() for p in parameters], torch.full((E,), math.inf, device=device)
    if "dynamics_training" in run.state:
        saved = run.state["dynamics_training"]
        dynamics.load_state_dict(run.state["dynamics"])
        opt.load_state_dict(saved["opt"])
        snapshot, best, epoch = [p.to(device) for p in saved["snapshot"]], saved["best"].to(device), saved["epoch"]
        run.restore_rng()

    def loss_fn(x, y):
        return (dynamics(x) - y).square().mean((1, 2))  # (E,)

    loss_fn = torch.compile(loss_fn) if args.compile else loss_fn
    bar = progress(args.dynamics_epochs, "dynamics", "epoch", epoch)
    while epoch < args.dynamics_epochs:
        rows = torch.stack([torch.randperm(len(x), device=device) for _ in range(E)])  # (E, N)
        total = torch.zeros(E, device=device)
        for idx in rows.split(args.dynamics_batch_size, 1):  # (E, B)
            loss = loss_fn(x[idx], y[idx])
            opt.zero_grad()
            loss.sum().backward()
            clip_member_gradients(parameters, args.dynamics_clip)
            opt.step()
            total += loss.detach()
        mse = total / math.ceil(len(x) / args.dynamics_batch_size)
        improved = mse < best
        best = torch.where(improved, mse, best)
        for kept, p in zip(snapshot, parameters, strict=True):
            kept[improved] = p.detach()[improved]
        epoch += 1
        run.log(0, {"model/epoch": epoch, "losses/dynamics": mse.mean(), "model/best_mse": best.mean()})
        training = {"opt": opt.state_dict(), "epoch": epoch, "best": best, "snapshot": snapshot}
        run.save("dynamics", epoch, dynamics=dynamics.state_dict(), dynamics_training=training)
        bar.set_postfix(mse=f"{mse.mean():.4g}", best=f"{best.mean():.4g}")
        bar.update()
    bar.close()
    with torch.no_grad():
        torch._foreach_copy_(parameters, snapshot)


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


def pack(obs, act, rew, next_obs, terminated):
    """Transitions as rows of one matrix, so that a batch is one index operation: (B, 2 O + A + 2)"""
    return torch.cat([obs, act, rew[:, None], next_obs, terminated[:, None].float()], -1)


def unpack(rows, obs_dim, act_dim):
    obs, act, rew, next_obs, terminated = rows.split([obs_dim, act_dim, 1, obs_dim, 1], -1)
    return obs, act, rew.squeeze(-1), next_obs, terminated.squeeze(-1)


def confident_states(policy, expert, supplementary, args):
    """The goals beside the expert states: supplementary states (M, O) where the policy is surer than on most expert states
    (N, O), or with the mean than on average, and the threshold (Alg. 1, l. 8)."""
    on_expert, log_conf = policy.log_confidence(expert), policy.log_confidence(supplementary)
    if args.threshold == "mean":  # Eq. 4; the mean of Conf, not of its logarithm
        threshold = on_expert.logsumexp(0) - math.log(len(expert))
        return supplementary[log_conf >= threshold], threshold
    threshold = on_expert.quantile(args.threshold_quantile)
    rows, cap = (log_conf > threshold).nonzero().squeeze(1), args.goal_cap * len(expert)
    if len(rows) > cap:
        rows = log_conf.topk(cap).indices
    return supplementary[rows], threshold


def start_states(size, expert, older, new, args):
    """States (size, O) from which a round goes back: expert ones, goals of earlier rounds, goals of this one, in exact shares."""
    rest = size - round(args.expert_starts * size) if len(older) + len(new) else 0
    num_new = 0 if not len(new) else rest if not len(older) else round(args.new_ratio * rest)
    draws = ((expert, size - rest), (older, rest - num_new), (new, num_new))
    return torch.cat([pool[torch.randint(len(pool), (n,), device=pool.device)] for pool, n in draws if n])


def resample(log_conf, size):
    """`size` of the states, without replacement, with weights 1 / (Conf + 1e-5): (N,) -> (size,) row numbers (Eq. 5)"""
    log_weight = -torch.logaddexp(log_conf, torch.full_like(log_conf, math.log(1e-5)))
    gumbel = -torch.empty_like(log_weight).exponential_().log()
    return (log_weight + gumbel).topk(size).indices


@torch.no_grad()
def augment(starts, policy, reverse_dynamics, reverse_policy, args):
    """One round of reverse rollouts (Alg. 1, l. 9, 10): rows (h (S // h), 2 O + A + 2), one step back after the other, and what to log.
    starts(n) gives the n states from which the first step goes back; the next one goes back from states that were kept."""
    size, kept_rows, before, after = args.rollout_rows // args.horizon, [], [], []
    for _ in range(args.horizon):  # Eq. 2
        next_obs = starts(args.oversampling * size)
        act = torch.cat([reverse_policy.sample(chunk) for chunk in next_obs.split(args.rollout_batch_size)])
        chunks = zip(next_obs.split(args.rollout_batch_size), act.split(args.rollout_batch_size), strict=True)
        obs = torch.cat([reverse_dynamics.predict(*chunk) for chunk in chunks])
        log_conf = policy.log_confidence(obs)
        kept = resample(log_conf, size)
        zeros = torch.zeros(size, device=obs.device)  # reward 0, no end
        kept_rows.append(pack(obs[kept], act[kept], zeros, next_obs[kept], zeros))
        before.append(log_conf.mean())
        after.append(log_conf[kept].mean())
        starts = lambda n, pool=obs[kept]: pool[torch.randint(len(pool), (n,), device=pool.device)]  # noqa: E731
    stats = {"log_confidence_imagined": torch.stack(before).mean(), "log_confidence_kept": torch.stack(after).mean()}
    return torch.cat(kept_rows), {f"model/{k}": v for k, v in stats.items()}


# --- learner ---


class AWAC:
    """Advantage-weighted actor-critic, its policy held to the expert rows by behaviour cloning. A learner has update, act,
    standing and `confidence`, the policy whose log_confidence(obs) decides what is imagined; all else is as in sra_iql.py."""

    def __init__(self, normalizer, obs_dim, act_dim, args, device):
        self.args, self.device, self.normalizer = args, device, normalizer
        self.policy = self.confidence = ClampedPolicy(obs_dim, act_dim, args.hidden).to(device)
        self.qf = QFunctions(obs_dim, act_dim, args.hidden).to(device)
        self.target_qf = QFunctions(obs_dim, act_dim, args.hidden).to(device).requires_grad_(False)
        self.target_qf.load_state_dict(self.qf.state_dict())
        adam = dict(lr=args.learning_rate, weight_decay=args.weight_decay, fused=True, capturable=device.type == "cuda")
        self.policy_opt, self.qf_opt = (torch.optim.Adam(f.parameters(), **adam) for f in (self.policy, self.qf))
        self.autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=args.bf16)
        if args.compile:
            mode = "reduce-overhead" if device.type == "cuda" else None
            for name in ("critic_loss", "policy_loss"):
                setattr(self, name, torch.compile(getattr(self, name), mode=mode))

    def critic_loss(self, obs, act, rew, next_obs, terminated):
        """TD error of both Q functions against the smaller target Q of the policy's next action."""
        with torch.no_grad():
            mean, log_std = self.policy(next_obs)
            next_act, _ = squash(mean, log_std, torch.randn_like(mean))
            target_q = rew + self.args.gamma * (1 - terminated) * self.target_qf(next_obs, next_act).amin(0)  # (B,)
        q = self.qf(obs, act)  # (2, B)
        stats = {"q/batch": q.detach().mean(), "q/target": target_q.mean(), "q/largest": q.detach().amax()}
        stats |= {"q/largest_target": target_q.amax()}
        return (q - target_q).square().mean(), stats

    def weight(self, obs, act, pi_act):
        """The advantage A (B,) of given actions over the policy's, and the weight min(exp(A / lambda), 100)."""
        with torch.no_grad():
            advantage = self.qf(obs, act).amin(0) - self.qf(obs, pi_act).amin(0)
            return advantage, (advantage / self.args.temperature).exp().clamp(max=100)

    def policy_loss(self, obs, act):
        """Cloning of the expert rows, the first half, and of all rows weighted by the advantage over a sample of the policy."""
        mean, log_std = self.policy(obs)
        pi_act, _ = squash(mean.detach(), log_std.detach(), torch.randn_like(mean))
        _, weight = self.weight(obs, act, pi_act)
        log_prob = squashed_log_prob(mean, log_std, act)  # (B,)
        clone = -log_prob[: self.args.batch_size // 2].mean()
        return self.args.bc_weight * clone - (weight * log_prob).mean(), clone.detach()

    def set_rates(self, step):
        """The policy's rate follows a cosine, and from the drop on a tenth of it; Q keeps its own until the drop, which takes it to
        what the policy has at that moment."""
        full, end, drop = self.args.learning_rate, self.args.cosine_updates, self.args.learning_rate_drop
        policy, others = (0.5 * (1 + math.cos(math.pi * min(1, t / end))) if end else 1.0 for t in (step, drop))
        dropped = 0 < drop <= step
        self.policy_opt.param_groups[0]["lr"] = full * policy * (0.1 if dropped else 1.0)
        self.qf_opt.param_groups[0]["lr"] = full * (0.1 * others if dropped else 1.0)

    def update(self, obs, act, rew, next_obs, terminated, step):
        """Q functions, targets, policy, in this order (in CORL the targets come last: the same, as the policy's loss uses none);
        the first half of the batch is expert rows. Returns metrics, which the next update may overwrite."""
        if self.args.compile:
            torch.compiler.cudagraph_mark_step_begin()
        self.set_rates(step)
        with self.autocast():  # one context a loss: it keeps the bfloat16 copies of the weights that it has made
            critic_loss, q_metrics = self.critic_loss(obs, act, rew, next_obs, terminated)
        descend(self.qf_opt, critic_loss)
        with torch.no_grad():  # or the targets would join the graph of the online networks, which then grows for ever
            torch._foreach_lerp_(list(self.target_qf.parameters()), list(self.qf.parameters()), self.args.tau)
        with self.autocast():
            policy_loss, clone = self.policy_loss(obs, act)
        descend(self.policy_opt, policy_loss)
        losses = {"losses/critic": critic_loss, "losses/policy": policy_loss, "losses/clone": clone}
        return {k: v.detach() for k, v in losses.items()} | q_metrics

    @torch.no_grad()
    def standing(self, obs, act):
        """What the learner thinks of some rows: mean advantage, and the mean weight with which it clones their actions. Against the
        policy's mean action: a sample would draw random numbers, and --log-every would change the run."""
        advantage, weight = self.weight(obs, act, self.policy(obs)[0].tanh())
        return {"advantage": advantage.mean(), "weight": weight.mean()}

    @torch.no_grad()
    def act(self, obs):
        """Observations of the environment (B, O) -> deterministic actions (B, A), on the CPU"""
        return self.policy(self.normalizer(obs.to(self.device)))[0].tanh().cpu()

    PARTS = ("normalizer", "policy", "qf", "target_qf", "policy_opt", "qf_opt")

    def state_dict(self):
        return {k: getattr(self, k).state_dict() for k in self.PARTS}

    def load_state_dict(self, state):
        for k in self.PARTS:
            getattr(self, k).load_state_dict(state[k])


# --- main ---


def transitions(data):
    """Which rows are used, (N,) bool: those with a true successor. A terminal row is none of them: nothing ends in SRA."""
    return data.has_next & (data.terminated == 0)


def labelled(data, reward, normalizer, device):
    """Rows of D^E (reward 1) or D^S (reward 0), states normalised; the rewards of the data set are not looked at (Alg. 1, l. 11)."""
    used = transitions(data)
    obs, act, next_obs = (x[used].to(device) for x in (data.obs, data.act, data.next_obs))
    return pack(normalizer(obs), act, torch.full_like(obs[:, 0], reward), normalizer(next_obs), torch.zeros_like(obs[:, 0]))


def one_step_error(dynamics, obs, act, next_obs):
    """Root mean square of the error in s, in standard deviations of the states, and the explained share of the variance of s - s':
    over all dimensions, and of the worst."""
    chunks = zip(*(x.split(2_000) for x in (next_obs, act, obs)), strict=True)
    mse = torch.cat([(dynamics.predict(s2, a) - s).square() for s2, a, s in chunks]).mean(0)  # (O,)
    variance = (obs - next_obs).var(0, unbiased=False)
    worst = (1 - mse / variance.clamp(min=1e-12)).amin()
    return {"one_step_rmse": mse.mean().sqrt(), "explained_variance": 1 - mse.mean() / variance.mean(), "explained_variance_worst": worst}


def reverse_models(expert_rows, rows, obs_dim, act_dim, args, run, key, given):
    """Reverse model and reverse policy (Alg. 1, l. 1-6), each phase taken up where the checkpoint left it, and with a seed of its own."""
    obs, act, _, next_obs, _ = unpack(torch.cat([expert_rows, rows]), obs_dim, act_dim)
    torch.manual_seed(4 * args.seed)
    dynamics = ReverseDynamics(obs_dim, act_dim, args).to(obs.device)
    if run.state.get("phase", "dynamics") == "dynamics":
        dynamics.load_state_dict(given) if given else train_reverse_dynamics(dynamics, obs, act, next_obs, args, run)
        some = torch.linspace(0, len(obs) - 1, min(len(obs), 20_000), device=obs.device).long()
        on_expert = one_step_error(dynamics, *(x[: len(expert_rows)] for x in (obs, act, next_obs)))
        errors = one_step_error(dynamics, *(x[some] for x in (obs, act, next_obs))) | {f"expert_{k}": v for k, v in on_expert.items()}
        run.log(0, {f"model/{k}": v for k, v in errors.items()})
        shown = ", ".join(f"{k.replace('_', ' ')} {v:.4g}" for k, v in errors.items())
        print(f"dynamics: {shown}", file=sys.stderr)
        run.save("rollout_policy", 0, dynamics=dynamics.state_dict(), dynamics_training=None, model_key=key)
    dynamics.load_state_dict(run.state["dynamics"])

    torch.manual_seed(4 * args.seed + 1)
    rollout_policy = {"cvae": ConditionalVAE, "uniform": UniformPolicy}[args.rollout_policy](obs_dim, act_dim, args).to(obs.device)
    if run.state["phase"] == "rollout_policy":
        if args.rollout_policy != "uniform":
            train_rollout_policy(rollout_policy, next_obs, act, args, run)
        run.save("policy", 0, rollout_policy=rollout_policy.state_dict(), rollout_policy_opt=None)
    rollout_policy.load_state_dict(run.state["rollout_policy"])
    return dynamics, rollout_policy


class AugmentedData:
    """D^R, round by round (Alg. 1, l. 8-10). A checkpoint holds the policies of the rounds, not their rows: each round has a seed
    of its own, so a resumed run (same device, same number of threads) imagines the same rows again."""

    def __init__(self, expert, supplementary, models, policy, normalizer, args, run):
        """expert (N, O), supplementary (M, O): states; models: reverse model and policy; policy: takes the weights of each round."""
        self.expert, self.supplementary, self.models, self.policy = expert, supplementary, models, policy
        self.normalizer, self.args, self.run, self.policies = normalizer, args, run, []
        self.goals, self.older, self.new = expert[:0], None, None
        for step, weights in run.state.get("rollout_policies", []):
            print(f"imagining the round of update {step} again", file=sys.stderr)
            self.add(step, weights, again=True)

    def add(self, step, weights, again=False):
        """A round with the policy of these weights (a state dict)."""
        self.policy.load_state_dict(weights)
        with torch.random.fork_rng():
            torch.manual_seed(1_000_000 * (4 * self.args.seed + 2) + len(self.policies))
            new, threshold = confident_states(self.policy, self.expert, self.supplementary, self.args)
            starts = lambda n: start_states(n, self.expert, self.goals, new, self.args)  # noqa: E731
            rows, stats = augment(starts, self.policy, *self.models, self.args)
        if not rows.isfinite().all():
            raise UserError("imagined rows are not finite: the reverse model has diverged; lower --dynamics-learning-rate", status=3)
        self.policies.append((step, {k: v.clone() for k, v in self.policy.state_dict().items()}))
        self.goals = torch.cat([self.goals, new])
        self.older, self.new = self.new if self.older is None else torch.cat([self.older, self.new]), rows
        if not again:
            some, experts = rows[:: max(1, len(rows) // 2_000)], self.expert[:: max(1, len(self.expert) // 10_000)]
            far = torch.cdist(some[:, : self.expert.shape[1]], experts).amin(1)
            stats |= {"model/goals": len(new), "model/log_confidence_threshold": threshold, "model/distance_to_expert": far.median()}
            self.run.log(step, stats | self.look(step))

    def __call__(self, size):
        """Rows of the last round and of the rounds before it, in exact shares."""
        num_new = size if self.older is None else round(self.args.new_ratio * size)
        draws = ((self.new, num_new), (self.older, size - num_new))
        return torch.cat([rows[torch.randint(len(rows), (n,), device=rows.device)] for rows, n in draws if n])

    def look(self, step):
        """On a maze, where expert, supplementary and imagined states are, as augmentation_<step>.png, the true simulator's word on
        the last round (how far its actions lead from where it says), and its share of states at rest, such as that at the goal."""
        if self.run.task.domain != "maze2d":
            return {}
        from maze2d_env import replay_error, view_states

        maze, (obs, act, _, next_obs, _) = self.run.task.kind.split("-")[0], unpack(self.new, 4, 2)
        groups = {"expert": self.expert, "supplementary": self.supplementary, f"imagined after {step} updates": obs}
        groups = {k: self.normalizer.inverse(x[:: max(1, len(x) // 5_000)]).cpu().numpy() for k, x in groups.items()}
        self.run.write(f"augmentation_{step}.png", lambda f: view_states(maze, groups).save(f, "PNG"))
        some = slice(None, None, max(1, len(obs) // 500))
        chains = (self.normalizer.inverse(obs[some]), act[some], self.normalizer.inverse(next_obs[some]))  # of one step each
        resting = (self.normalizer.inverse(obs)[:, 2:].norm(dim=1) < 0.1).float().mean()
        error = replay_error(maze, *(x[:, None].double().cpu().numpy() for x in chains))[0]
        return {"model/replay_error_1": error, "model/imagined_at_rest": resting}


def main(args):
    # Weight decay drives the weights of dead units into denormal numbers, on which a CPU is 20 times slower. Only threads that
    # start after this flush them, so it comes first.
    torch.set_flush_denormal(True)
    task = parse_task(args.env)
    args = resolve(args, task)
    device = pick_device(args.device)
    data = load_dataset(task, args.dataset, rewards=False)
    expert = load_expert(task, args.expert_dataset, args.expert_trajectories, data)
    for flag, few in (("dataset", transitions(data).sum() < 10), ("expert-dataset", transitions(expert).sum() < 10)):
        if few:
            raise UserError(f"--{flag} {getattr(args, flag.replace('-', '_'))}: too few transitions with a known successor")
    both = replace(data, sha256=f"{data.sha256} {expert.sha256} {args.expert_trajectories}")
    key = model_key("reverse", args, both)
    augmenting = args.model_ratio > 0 and args.warmup < args.total_updates
    given = model_of_another_run(args, key) if args.dynamics_from and augmenting else None
    envs = [make_env(task) for _ in range(args.eval_episodes)]
    run = Run(args, task, data, device)
    if run.finished:
        return print(f"{run.folder} is finished (rates and rounds depend on --total-updates: more are another run)")
    torch.set_num_threads(args.num_threads)
    keep_freed_memory()
    if args.compile:
        torch._inductor.config.fallback_random = True  # the random numbers of eager mode
    random.seed(args.seed)
    np.random.seed(args.seed)

    obs_dim, act_dim, half = data.obs.shape[1], data.act.shape[1], args.batch_size // 2
    normalizer = Normalizer(torch.cat([d.obs[transitions(d)] for d in (expert, data)])).to(device)
    expert_rows, rows = labelled(expert, 1.0, normalizer, device), labelled(data, 0.0, normalizer, device)
    imagined = None
    if augmenting:
        models = reverse_models(expert_rows, rows, obs_dim, act_dim, args, run, key, given)
        policy = ClampedPolicy(obs_dim, act_dim, args.hidden).to(device)
        imagined = AugmentedData(expert_rows[:, :obs_dim], rows[:, :obs_dim], models, policy, normalizer, args, run)
    torch.manual_seed(4 * args.seed + 3)  # with and without imagined data the learner starts from the same networks
    agent, step = AWAC(normalizer, obs_dim, act_dim, args, device), 0
    if "agent" in run.state:
        agent.load_state_dict(run.state["agent"])
        step = run.state["step"]
        run.restore_rng()

    bar, score = progress(args.total_updates, args.exp_name, "update", step), None
    begin, mark = (step, time.time()), (step, time.time())
    while step < args.total_updates:  # Alg. 1, l. 7-13; a batch: half D^E, half D^S u D^R, exactly num_model rows of it imagined
        num_model = 0
        if augmenting and step >= args.warmup:
            if (step - args.warmup) % args.rollout_every == 0:
                imagined.add(step, agent.confidence.state_dict())
            num_model = round(args.model_ratio * half)
        draws = ((expert_rows, half), (rows, half - num_model))
        batch = [x[torch.randint(len(x), (n,), device=device)] for x, n in draws] + ([imagined(num_model)] if num_model else [])
        metrics = agent.update(*unpack(torch.cat(batch), obs_dim, act_dim), step)
        step += 1
        bar.update()
        save = step % args.checkpoint_every == 0 or step == args.total_updates
        if step % args.log_every == 0 or save:
            sps, mark = (step - mark[0]) / (time.time() - mark[1]), (step, time.time())
            for group, part in zip(("expert", "supplementary", "imagined"), batch, strict=False):
                if len(part):  # --model-ratio 1: no supplementary row
                    metrics |= {f"q/{k}_{group}": v for k, v in agent.standing(*unpack(part, obs_dim, act_dim)[:2]).items()}
            run.log(step, metrics | {"charts/SPS": sps})
            shown = {k.removeprefix("losses/"): f"{v:.4g}" for k, v in metrics.items() if k.startswith("losses/")}
            bar.set_postfix(shown | ({} if score is None else {"score": score}))
        if args.eval_episodes and (step % args.eval_every == 0 or step == args.total_updates):
            score = round(run.evaluate(step, envs, agent.act), 1)
        if save:
            if not all(p.isfinite().all() for f in vars(agent).values() if isinstance(f, nn.Module) for p in f.parameters()):
                raise UserError(f"weights not finite at update {step}; {run.folder} keeps its last good checkpoint", status=3)
            run.save("policy", step, agent=agent.state_dict(), **({"rollout_policies": imagined.policies} if augmenting else {}))
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
