"""ARMOR: adversarial model for offline RL. A policy is trained to beat a reference policy in the worst model that fits the data.

Paper: Bhardwaj et al. 2023, arXiv:2302.11048. We found no public code (its page is said to be sites.google.com/view/armorofflinerl,
which we could not reach); what we know of the paper comes from a poster with its Algorithm 1 and Eq. 4, 5. The base is ATAC
(Cheng et al. 2022, arXiv:2202.02446), code: microsoft/ATAC, microsoft/lightATAC.

  game         max_pi min_(M in M_alpha) J_M(pi) - J_M(pi_ref)     M_alpha: models that explain the data almost as well as the best
  D_M          (s, a, r_M, s'_M), r_M = R_M(s, a), s'_M ~ P_M(.|s, a)    (s, a) of the data and of D_model            Alg. 1, l. 3-4
  adversary    min_(f_i, M) L(f_i) + beta (E^w(f_i, M) + lambda E_D(M)), i = 1, 2; f_i projected                      l. 5, Eq. 4
               L    = E_DM[f(s, pi) - f(s, pi_ref)]                                          relative pessimism
               E^w  = (1-w) E_DM[(f - r_M - gamma f(s'_M, pi))^2]                            residual
                      +   w E_DM[(f - r_M - gamma min_j f_target,j(s'_M, pi))^2]             and against slow copies: double-Q residual
               E_D  = E_data[-log P_M(s'|s, a) + (R_M(s, a) - r)^2 / V_max^2]                data fit
  actor        max_pi L(f_1) at a rate 1000 times slower, with entropy                                                l. 6, Eq. 5
  rollouts     one step of pi and one of pi_ref in M per update, their (s, a) into D_model; new starts every H        l. 7-8

    python algorithms/armor.py --env hopper-medium-replay
    python algorithms/armor.py --env hopper-medium-replay --reference runs/<run> --exp-name armor_on_<run>    # improve on another run
    python algorithms/armor.py --env hopper-medium-replay --model-ratio 0           # ATAC: no model, transitions of the data

E_x[.] is a mean over rows of x, f alone is f_i(s, a), and lambda takes the place of M_alpha's alpha (alpha in the code: the
temperature). L looks at given states only, so M gets its gradient from E^w and E_D alone, and beta does not change its direction: L
makes the critics pessimistic, and M is made to agree with them as far as lambda lets it leave the data. Rollouts are detached.

What the poster leaves open, and what is done here. "unverified": said to be the paper's, by sources that we could not check.
  1. E_D is taken on the data's rows. Eq. 4 prints D_model, which holds no r and no s'. Rows without a known successor are left out.
     L, E^w and E_D are means over rows of the minibatch; the poster prints E_D as a sum.
  2. V_max: ours, the fitted model's reward error on held-out rows (at least 1e-3), so that rewards are held to the data about as
     states are. With the bound of the returns, 550 on hopper, the predicted reward follows the critics: its error rose from 0.03 to
     2.0 in 400 updates (a trial).
  3. M is one member of MOPO's ensemble (arXiv:2005.13239; 4 layers of 200, learnt variance), R_M the mean of its reward output.
     Ours: fitted alone, by early stopping on held-out rows (unverified: 100 000 steps). E_D leaves these out as well, so that they
     tell whether the game harms the model. Weight decay stays on, as strong against the data fit as it was; the bounds of
     the log-variance stay where the fit left them; and M's rate rises over 500 updates: with Adam's first steps at full length the
     fit is lost at once and found again after some 50 updates (a trial: 25 to -160 and back to 25 nats of log P per row). M is
     never frozen, whatever becomes of its fit: lambda alone holds it.
  4. One backward pass gives the gradients for M and f_i, so f_i steps on the M of before this step. s'_M is reparameterised, and
     M's gradient also flows through a' ~ pi(.|s'_M) and through the target networks' inputs. Means over actions and successors are
     one sample a row, so E^w contains the variance of gamma f(s'_M, a'), which M can lower as well.
  5. ATAC's code: L and E^w (the poster only names them); terms are added as L / beta + E for beta > 1 (bounded gradients), Proj_F
     is a Frobenius norm of 100 per layer, one sampled a' per row serves residual and target, tau, gamma, w = 1/2, rates 5e-4 and
     5e-7 (unverified for ARMOR, the same), 3 x 256 units. Proj_Pi is a learnt temperature for an entropy of minus the number of
     actions; it steps before the policy, on the same samples as L; value and entropy are added like L and E. Off in ATAC's code
     unless asked for: values of the next state in the target are clipped, here to what rewards of the data allow (r_M is not).
     Not ATAC's: the policy's log standard deviation lies in [-5, 2].
  6. Warm start as in ATAC's code, 100 000 updates (unverified: so ARMOR): the policy clones the data, by likelihood (of actions
     clipped to 1 - 1e-6) and with the entropy bonus of the game, so it is no plain clone; the critics minimise E^w of the data's
     transitions. Then the policy's optimiser begins anew at the slow rate, the temperature at 1 with a new one at the fast rate;
     that of the critics and their slow copies go on (Alg. 1, l. 1, makes new copies). The clone, frozen, is pi_ref.
     If another reference is given, pi begins as a copy of its network, of that network's size, with this script's bounds (log
     standard deviation as above; none on the mean), and only the critics have a warm start, with half of their rows from rollouts
     in the fitted M: of actions a' unlike the data's the data say nothing, and the error is made small by bending f(s', a') to
     f(s, a) instead of the reverse (trials on hopper beside two policies of SAC: after 40 000 updates mean Q was 10 and 12, with
     such rows, and over them, 131 and 140, and the game then lost or gained in discounted return). The target entropy is the
     copy's own in the data's states where that is below minus the number of actions, so that pi_ref itself is allowed (a trial:
     SAC's, -6.7, was pressed to -3, and the policy lost a third of its score). --clone reference: pi begins as a clone of its
     actions in the same rows, a poor one where it meets others (a trial, the data's rows only: a SAC policy of 91 points, its
     clone 8); --clone data: as a clone of the data's actions, from the data alone.
  7. Batches of 256, half from D_model: ours. D_model is empty in the first update, which takes the data's half only.
  8. H is the episode length (unverified). Ours: what ends (the environment's rule; without one nothing ends) does not bootstrap,
     and the data's own terminals count in the warm start only; rollouts that end, overflow, or leave the data's range, widened by
     10 % on either side, begin again in the minibatch's states (a trial: when states were clipped to the range instead, 30 % of
     D_model lay at its border after 100 000 updates on hopper); their last pair stays in D_model, which keeps its last 1 000 000.
  9. beta = 16 (the default of ATAC's scripts; lightATAC: 3) and lambda = 10 000 were chosen on halfcheetah-jump with a seed that is
     used for nothing else (benchmarks.md); the paper's, one pair per data set, are not known. With too small a lambda M gives way to
     the critics off the data, which its fit to held-out rows hardly shows: with 1 its targets on hopper are lower than the fitted
     model's by up to 3.75, more than the mean reward of a step (model/backup_shift), and the policy falls back to its reference;
     with 1000 and less the cheetah of that choice falls in M less often than in the fitted model and in the simulator
     (model/return_shift). In trials of 400 updates on hopper M lost 4 nats of log P per row with 0.1, 20 to 45 with 0.01.
 10. --model-ratio 0 is ATAC: E^w uses the data's r, s' and terminals, and L compares with its actions, unless --reference names
     another policy. What is logged as the reference is the clone, or the policy named.
 11. A checkpoint holds D_model, which turns over in 4 000 updates and cannot be made again: 56 MB on hopper.
 12. J(pi) and J(pi_ref) are returns of mean actions in the same episodes, as they are and discounted; the game is about discounted
     ones, and is played on sampled actions.

What to watch, besides them: model/nll, of held-out rows, against model/nll_fitted (above it the game harms M); model/reward_shift,
state_shift, backup_shift and return_shift, how far M has gone from the fitted model where no data hold it; model/rollout_ended and
rollout_left, the shares of rollouts that begin again in an update; model/rollout_drift_*, how far out they are (1: as the data);
losses/relative, L of f_1; q/policy_shift, mean |a - a_ref| in states of the data; q/weight_norm, at 100 Proj_F acts. Of
losses/adversary nearly all is lambda times losses/data_fit.
"""

import copy
import ctypes
import hashlib
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
    env: Annotated[str, tyro.conf.arg(aliases=["--env-id"])] = "hopper-medium-replay"  # D4RL task (version optional) or Minari id
    exp_name: str | None = None  # None: armor; atac without model
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
    ensemble_size = num_elites = 1  # no flags, "the only model-based method that doesn't rely on model ensembles"

    # --- rollout ---
    horizon: int | None = None  # updates after which all rollouts begin again (H); None: the task's episode length
    model_ratio: float = 0.5  # share of pairs from D_model in a batch, the others are the data's; 0: ATAC, no model
    pairs_kept: Annotated[int, tyro.conf.arg(aliases=["--model-buffer-size"])] = 1_000_000  # (s, a) in D_model, the oldest go first
    rollout_margin: float = 0.1  # imagined states may leave the data's range by this share of its width, then their rollout begins again

    # --- learner ---
    reference: str | None = None  # pi_ref: bc (clone of the data), data (ATAC's), a run's folder or a policy's file; None: bc, atac: data
    warm_start_updates: int = 100_000  # of cloning and of the critics on the data (beside a given reference half in M), before the game
    warm_start_from: str | None = None  # folder of another run whose warm start is taken: same data, seed and settings, so the same one
    clone: Literal["data", "reference", "copy"] | None = None  # pi clones these actions, or copies pi_ref; None: copy if one is given
    model_ramp: int = 500  # updates in which the model's rate rises from 0 to the adversary's
    batch_size: int = 256  # real and imagined rows together
    gamma: float = 0.99  # discount
    tau: float = 0.005  # rate of the target networks
    hidden: tuple[int, ...] = (256, 256, 256)  # widths of the hidden layers of policy (a copied one keeps its own) and Q functions
    fast_lr: float = 5e-4  # adversary: critics and model; temperature; everything in the warm start (eta_fast)
    slow_lr: float = 5e-7  # policy (eta_slow)
    target_entropy: float | None = None  # None: minus the number of action dimensions; of a copied policy its own if that is lower
    bellman_weight: Annotated[float, tyro.conf.arg(aliases=["--beta"])] = 16.0  # of E^w and E_D against relative pessimism (beta)
    fit_weight: Annotated[float, tyro.conf.arg(aliases=["--lambda"])] = 10_000.0  # of the data fit against the Bellman error (lambda)
    target_weight: float = 0.5  # share of the error against the target networks in the Bellman error, the rest is residual (w)
    v_max: float | None = None  # scale of the reward's error in the data fit (V_max); None: the error of the fitted model
    clip_v: bool = True  # clip target values to the returns that the data's rewards allow
    weight_norm: float = 100.0  # largest Frobenius norm of a critic's layer (Proj_F)


# Flags that change no update (the number of threads only its rounding): a run may be carried on with other values of them.
BOOKKEEPING = {"run_dir", "checkpoint_every", "log_every", "num_threads", "total_updates", "track", "device", "dynamics_from"}
BOOKKEEPING |= {"wandb_project_name", "wandb_entity", "wandb_group"}
BOOKKEEPING |= {"dataset"}  # their contents count, not how they were asked for
BOOKKEEPING |= {"warm_start_from"}
ADDED = {"bf16", "dynamics_bf16"}  # flags younger than the first runs: one that was begun without them goes on with the default
MAY_BE_ZERO = {"seed", "model_ratio", "eval_episodes", "gamma", "dynamics_weight_decay", "dynamics_patience", "rollout_margin"}
MAY_BE_ZERO |= {"bellman_weight", "fit_weight", "target_weight", "warm_start_updates"}


def resolve(args, task):
    """The arguments with the task's settings where the user left None; UserError for what cannot work."""
    tuned = {"horizon": task.max_steps, "reference": "bc" if args.model_ratio > 0 else "data"}
    tuned["clone"] = "data" if args.reference in (None, "bc", "data") else "copy"
    args = replace(args, **{k: v for k, v in tuned.items() if getattr(args, k) is None})
    args = replace(args, reference=os.path.normpath(args.reference).removesuffix(f"{os.sep}checkpoint.pt"))  # one run, one spelling
    for name, value in asdict(args).items():
        for v in value if isinstance(value, tuple) else (value,):
            flag = f"--{name.replace('_', '-')} {v}"
            if type(v) is float and not math.isfinite(v):
                raise UserError(f"{flag}: must be a finite number")
            if type(v) in (int, float) and name != "target_entropy":
                if v < 0 or (v == 0 and name not in MAY_BE_ZERO):
                    raise UserError(f"{flag}: must be {'at least 0' if name in MAY_BE_ZERO else 'positive'}")
                if (v > 1 and name in ("gamma", "tau", "model_ratio", "target_weight")) or (v >= 1 and name == "holdout_ratio"):
                    raise UserError(f"{flag}: must be {'below' if name == 'holdout_ratio' else 'at most'} 1")
    if len(args.dynamics_weight_decay) != 5:
        raise UserError("--dynamics-weight-decay needs 5 values")
    num_model = round(args.model_ratio * args.batch_size)
    if args.model_ratio > 0 and not 0 < num_model < args.batch_size:
        raise UserError(f"--model-ratio {args.model_ratio}: {args.batch_size} rows need some real and some imagined ones; 0: no model")
    if num_model and args.pairs_kept < 2 * (args.batch_size - num_model):
        raise UserError(f"--pairs-kept {args.pairs_kept}: one update adds {2 * (args.batch_size - num_model)} pairs")
    if num_model and args.reference == "data":
        raise UserError("--reference data: imagined states have no actions of the data; give bc, a run's folder, or --model-ratio 0")
    if args.clone in ("reference", "copy") and args.reference in ("bc", "data"):
        raise UserError(f"--clone {args.clone}: --reference {args.reference} is the data itself")
    if not args.warm_start_updates and args.clone != "copy":
        raise UserError("--warm-start-updates 0: then there is no clone; give a run's folder as --reference, and no --clone but copy")
    return replace(args, exp_name=args.exp_name or ("armor" if num_model else "atac"), num_threads=args.num_threads or os.cpu_count())


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


# --- reference policy ---


class Reference(nn.Module):
    """pi_ref, frozen: the Gaussian policy in the state of an agent of these scripts, or of datasets/mujoco.py."""

    def __init__(self, agent):
        super().__init__()
        weights = dict(agent["policy"])
        self.low = -20 if "head.weight" in weights else -5  # datasets/mujoco.py: another bound, and other names
        for old, new in (("body.", "net."), ("head.", "net.4.")):
            weights = {k.replace(old, new): w for k, w in weights.items()}
        self.bound = 9 if "normalizer" in agent else math.inf
        if "normalizer" in agent:  # sra_iql.py: its policy sees standardised states, and its mean is clamped
            weights["net.0.weight"] = weights["net.0.weight"] / agent["normalizer"]["std"]
            weights["net.0.bias"] = weights["net.0.bias"] - weights["net.0.weight"] @ agent["normalizer"]["mean"]
        shapes = [w.shape for k, w in weights.items() if k.endswith("weight")]  # (out, in) of every layer
        self.net = mlp(shapes[0][1], *(n for n, _ in shapes))
        self.load_state_dict(weights)
        self.requires_grad_(False)

    def sample(self, obs):
        """obs (B, O) -> (B, A)"""
        mean, log_std = self.net(obs).chunk(2, -1)
        return squash(mean.clamp(-self.bound, self.bound), log_std.clamp(self.low, 2), torch.randn_like(mean))[0]

    def best(self, obs):
        return self.net(obs).chunk(2, -1)[0].clamp(-self.bound, self.bound).tanh()


def given_reference(args, data, domain=""):
    """The policy in --reference: the folder (or checkpoint.pt) of a run of these scripts or of datasets/mujoco.py, or a file of its
    --keep-policies. It must have acted in this `domain`, where both are known."""
    flag, path = f"--reference {args.reference}:", Path(args.reference)
    path = path / "checkpoint.pt" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{flag} no checkpoint.pt there; give bc, data, the folder of a run, or a policy_<step>.pt")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # SAC's holds a whole replay buffer
        if state.get("phase", "policy") != "policy" or "agent" not in state:
            raise UserError(f"{flag} its policy is not trained yet; give a run that has come to its learner")
        reference = Reference(state["agent"])
    except UserError:
        raise
    except Exception as e:  # whatever the bytes of a damaged file lead to
        why = "as a BCQ run, for example" if isinstance(e, KeyError) else f"{type(e).__name__}: {str(e)[:80]}"
        raise UserError(f"{flag} holds no Gaussian policy ({why})") from None
    have, want = (reference.net[0].in_features, reference.net[-1].out_features // 2), (data.obs.shape[1], data.act.shape[1])
    if have != want:
        raise UserError(f"{flag} its states and actions have {have} entries, those of the data {want}; is it a run of another task?")
    config, name = path.parent / "config.json", path.parent.name.removeprefix("sac-")  # of datasets/mujoco.py: sac-<env>-...
    theirs = (json.loads(config.read_text())["task"] if config.exists() else name).split("-")[0]
    if domain and theirs != domain and theirs in ("halfcheetah", "hopper", "walker2d", "ant", "maze2d", "antmaze"):
        raise UserError(f"{flag} is a policy for {theirs}, not for {domain}")
    weights = b"".join(w.contiguous().numpy().tobytes() for w in reference.state_dict().values())
    data.more_facts["reference"] = hashlib.sha256(weights).hexdigest()  # into config.json: a run does not go on with another one
    if config.exists() and not (path.parent / "result.json").exists():
        print(f"note: {flag} is not finished; if it trains on, this run cannot be resumed (a copy of its folder would do)", file=sys.stderr)
    return reference


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


def gaussian(dynamics, obs, act):
    """Mean and log-variance of (r, s' - s) under the single model, (B, 1+O) each, with gradients."""
    mean, logvar = dynamics(dynamics.inputs(obs, act).unsqueeze(0))
    return mean[0], logvar[0]


@torch.no_grad()
def model_fit(dynamics, obs, act, rew, next_obs):
    """How badly the model predicts rows of the data: negative log-density of s' and root mean squared errors."""
    mean, logvar = gaussian(dynamics, obs, act)
    squares = (mean - torch.cat([rew[:, None], next_obs - obs], -1)).square()
    fit = {"nll": data_fit(mean, logvar, obs, rew, next_obs, torch.ones_like(rew), math.inf)}
    fit |= {"reward_error": squares[:, 0].mean().sqrt(), "state_error": squares[:, 1:].mean().sqrt()}
    return {f"model/{k}": v for k, v in fit.items()}


@torch.no_grad()
def model_shift(dynamics, original, rollouts, agent):
    """How far the game has moved the model from the fitted one where no data hold it: on pairs of D_model, root mean squared
    differences in r, in its unit, and in s', in standard deviations of the data; and the mean difference in
    r + gamma f_1(s', pi), on mean s' and actions: below 0, M lets the critics believe less than the fitted model would."""
    pairs = rollouts.pairs[: rollouts.added]
    obs, act = pairs[:: max(1, len(pairs) // 2_000)].split([rollouts.mean.shape[0], pairs.shape[1] - rollouts.mean.shape[0]], -1)
    means = [gaussian(model, obs, act)[0] for model in (dynamics, original)]
    shift, backups = means[0] - means[1], []
    for mean in means:
        next_obs = obs + mean[:, 1:]
        next_q = agent.qf.q1(torch.cat([next_obs, agent.policy(next_obs)[0].tanh()], -1)).squeeze(-1)
        backups.append(mean[:, 0] + agent.args.gamma * torch.where(agent.terminates(obs, act, next_obs), 0.0, next_q))
    squares = {"reward": shift[:, 0], "state": shift[:, 1:] / rollouts.std}
    shifts = {f"model/{k}_shift": v.square().mean().sqrt() for k, v in squares.items()}
    return shifts | {"model/backup_shift": (backups[0] - backups[1]).mean()}


@torch.no_grad()
def return_shift(dynamics, original, obs, agent, values):
    """Discounted return of the policy, imagined from states of the data (N, O) over 2 / (1 - gamma) steps, but no more than
    H, less that in the fitted model: what a single step does not show, such as a fall that M has forgotten. values: their range."""
    gamma, returns, (low, high) = agent.args.gamma, [], values
    for model in (dynamics, original):
        generator = torch.Generator(obs.device).manual_seed(0)  # the same random numbers for both, and none of the game's
        state, total, weight = obs, torch.zeros(len(obs), device=obs.device), torch.ones(len(obs), device=obs.device)
        for _ in range(min(agent.args.horizon, round(2 / max(1 - gamma, 1e-8)))):
            mean, log_std = agent.policy(state)
            act = squash(mean, log_std, torch.randn(mean.shape, generator=generator, device=obs.device))[0]
            mean, logvar = gaussian(model, state, act)
            noise = torch.randn(state.shape, generator=generator, device=obs.device)
            next_obs = state + mean[:, 1:] + (0.5 * logvar[:, 1:]).exp() * noise
            total += weight * mean[:, 0]
            ended = agent.terminates(state, act, next_obs) | ~next_obs.isfinite().all(-1)
            weight = gamma * torch.where(ended, 0.0, weight)
            state = torch.where(ended[:, None], obs, next_obs)
        returns.append(total.nan_to_num(low, high, low).clamp(low, high).mean())  # a rollout that runs away counts as the worst or the best
    return {"model/return_shift": returns[0] - returns[1]}


def data_fit(mean, logvar, obs, rew, next_obs, known, v_max):
    """E_D(M), averaged over the rows with a known successor: -log P_M(s'|s, a) + (R_M(s, a) - r)^2 / V_max^2"""
    error = next_obs - obs - mean[:, 1:]
    nll = 0.5 * (error.square() * (-logvar[:, 1:]).exp() + logvar[:, 1:] + math.log(2 * math.pi)).sum(-1)
    return ((nll + (mean[:, 0] - rew).square() / v_max**2) * known).sum() / known.sum().clamp(min=1)


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


class Rollouts:
    """D_model, and the states in M from which pi and pi_ref go on (Alg. 1, l. 7-8)."""

    def __init__(self, obs, act_dim, num_starts, terminates, args, device):
        self.args, self.terminates = args, terminates
        self.states = torch.zeros(2 * num_starts, obs.shape[1], device=device)  # first half: of pi, second half: of pi_ref
        self.pairs = torch.zeros(args.pairs_kept, obs.shape[1] + act_dim, device=device)  # (s, a)
        low, high = obs.to(device).aminmax(dim=0)
        margin = args.rollout_margin * (high - low)
        self.low, self.high = low - margin, high + margin
        std = obs.std(0)
        self.mean, self.std = obs.mean(0).to(device), torch.where(std < 1e-6, 1.0, std).to(device)
        self.added = self.steps = self.totals = 0

    def sample(self, size):
        """(size, O+A) of D_model; no rows while it is empty"""
        filled = min(self.added, len(self.pairs))
        return self.pairs[torch.randint(filled, (size,), device=self.pairs.device)] if filled else self.pairs[:0]

    @torch.no_grad()
    def advance(self, step, starts, policy, reference, dynamics):
        """One step in M from every state; starts (N, O): the states of this update's real rows."""
        starts = starts.repeat(2, 1)
        if step % self.args.horizon == 0:
            self.states = starts  # l. 7
        own, given = self.states.chunk(2)
        mean, log_std = policy(own)
        act = torch.cat([squash(mean, log_std, torch.randn_like(mean))[0], reference.sample(given)])
        slots = (self.added + torch.arange(len(act), device=act.device)) % len(self.pairs)
        self.pairs[slots] = torch.cat([self.states, act], -1)  # l. 8
        self.added += len(act)
        mean, logvar = gaussian(dynamics, self.states, act)
        next_obs = self.states + mean[:, 1:] + (0.5 * logvar[:, 1:]).exp() * torch.randn_like(starts)
        ended = self.terminates(self.states, act, next_obs) | ~next_obs.isfinite().all(-1)
        left = ((next_obs < self.low) | (next_obs > self.high)).any(-1) & ~ended
        self.states = torch.where((ended | left)[:, None], starts, next_obs)
        drift = ((self.states - self.mean) / self.std).square().mean(-1).view(2, -1).mean(1)  # of pi, of pi_ref
        self.totals = self.totals + torch.cat([ended.float().mean(0, True), left.float().mean(0, True), drift])
        self.steps += 1

    def report(self):
        """Averages since the last report; the drift is a root mean square in standard deviations, 1 where the data is."""
        ended, left, own, given = self.totals / self.steps
        self.totals, self.steps = 0, 0
        stats = {"ended": ended, "left": left, "drift_policy": own.sqrt(), "drift_reference": given.sqrt()}
        return {f"model/rollout_{k}": v for k, v in stats.items()}

    @torch.no_grad()
    def transitions(self, size, dynamics):
        """Pairs of D_model and what follows in M (Alg. 1, l. 4), for the warm start: (B, O), (B, A), (B,), (B, O), (B,)"""
        obs, act = self.sample(size).split([len(self.mean), self.pairs.shape[1] - len(self.mean)], -1)
        mean, logvar = gaussian(dynamics, obs, act)
        next_obs = obs + mean[:, 1:] + (0.5 * logvar[:, 1:]).exp() * torch.randn_like(obs)
        return obs, act, mean[:, 0], next_obs, self.terminates(obs, act, next_obs).float()

    def state_dict(self):
        full = self.added >= len(self.pairs)  # else a view, and torch.save writes all that a view is one of
        return {"states": self.states, "pairs": self.pairs if full else self.pairs[: self.added].clone(), "added": self.added}

    def load_state_dict(self, state):
        self.states, self.added = state["states"].to(self.states.device), state["added"]
        self.pairs[: len(state["pairs"])] = state["pairs"]


# --- learner ---


@torch.no_grad()
def entropy(policy, obs):
    """Mean entropy of the policy in states (N, O), from one sample each, the same ones every time."""
    mean, log_std = policy(obs)
    return -squash(mean, log_std, torch.randn(mean.shape, generator=torch.Generator().manual_seed(0)))[1].mean().item()


def value_range(rew, gamma):
    """Smallest and largest return that rewards in the range of `rew` (N,) and 0 allow, at least 1 / (1 - gamma) apart (lightATAC's
    --clip_v)."""
    per_step = 1 / max(1 - gamma, 1e-8)
    high = max(0.0, rew.max().item() * per_step)
    return min(0.0, rew.min().item() * per_step, high - per_step), high


def normalized_sum(loss, regulariser, weight):
    """loss + weight * regulariser, divided by the weight where that is above 1: the same optimum, bounded gradients."""
    return loss / weight.clamp(min=1) + weight.clamp(max=1) * regulariser


def bellman_error(q, backup, target, w):
    """E^w, "DQRA": (1 - w) (q - backup)^2 + w (q - target)^2; q and its own backup (2, B), target (B,) -> (2,)"""
    return (1 - w) * (q - backup).square().mean(1) + w * (q - target).square().mean(1)


def project(weights, bound):
    """Proj_F: scales a matrix whose Frobenius norm exceeds the bound back onto it; returns the norms before."""
    norms = torch._foreach_norm(weights)
    factors = torch._foreach_clamp_max(torch._foreach_mul(torch._foreach_reciprocal(norms), bound), 1.0)
    torch._foreach_mul_(weights, factors)
    return torch.stack(norms)


class ARMOR:
    """The two players; without `dynamics` ATAC."""

    def __init__(
        self, obs_dim, act_dim, args, device, values=(-math.inf, math.inf), dynamics=None, terminates=None, v_max=1.0, policy=None
    ):
        """values: range of the returns; policy: what it begins with, None: random weights. The reference is None where the actions of the
        data are pi_ref's, and in the warm start."""
        self.args, self.device, self.dynamics, self.terminates, self.v_max = args, device, dynamics, terminates, v_max
        self.reference = None
        self.values = values if args.clip_v else (-math.inf, math.inf)
        self.policy = (policy or Policy(obs_dim, act_dim, args.hidden)).to(device)
        self.qf = QFunctions(obs_dim, act_dim, args.hidden).to(device)
        self.target_qf = QFunctions(obs_dim, act_dim, args.hidden).to(device).requires_grad_(False)
        self.target_qf.load_state_dict(self.qf.state_dict())  # l. 1; the warm start moves both, the copy behind
        self.log_alpha = nn.ParameterDict({"sac": torch.zeros(())}).to(device)  # temperature
        self.target_entropy = -float(act_dim) if args.target_entropy is None else args.target_entropy
        self.beta = torch.tensor(args.bellman_weight, device=device)
        self.projected = [p for k, p in self.qf.named_parameters() if k.endswith("weight")]
        groups = [{"params": list(self.qf.parameters())}]
        if dynamics is not None:  # the bounds of the log-variance are in no `inputs` and never step
            scale = obs_dim + 1  # the fit averages twice the NLL over outputs; here it is summed, and counts for f_1 and for f_2
            scale *= args.fit_weight * min(1, args.bellman_weight)  # as much as the data fit counts in normalized_sum
            decays = [(g["params"], scale * g["weight_decay"]) for g in dynamics.optimizer().param_groups]
            groups += [{"params": params, "weight_decay": decay} for params, decay in decays]
            self.PARTS += ("dynamics",)
        self.adam = dict(fused=True, capturable=device.type == "cuda")
        self.autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=args.bf16)
        self.adversary_opt = torch.optim.Adam(groups, lr=args.fast_lr, **self.adam)
        self.new_actor_optimizers(args.fast_lr)
        if args.compile:
            mode = "reduce-overhead" if device.type == "cuda" else None
            for name in ("bellman", "adversary_loss", "policy_loss"):
                setattr(self, name, torch.compile(getattr(self, name), mode=mode, dynamic=False))  # D_model is empty at first

    def new_actor_optimizers(self, policy_lr):
        self.policy_opt = torch.optim.Adam(self.policy.parameters(), lr=policy_lr, **self.adam)
        self.alpha_opt = torch.optim.Adam(self.log_alpha.parameters(), lr=self.args.fast_lr, **self.adam)

    def warm_start_state(self):
        """What the game goes on with: networks, and the critics' part of the optimiser (that of M has not begun)."""
        state = {k: getattr(self, k).state_dict() for k in ("policy", "qf", "target_qf")}
        return copy.deepcopy(state | {"critics_adam": self.adversary_opt.state_dict()["state"]})

    def load_warm_start(self, state):
        for k in ("policy", "qf", "target_qf"):
            getattr(self, k).load_state_dict(state[k])
        self.adversary_opt.load_state_dict(self.adversary_opt.state_dict() | {"state": state["critics_adam"]})

    def begin_game(self):
        """From the warm start to the game: slow policy, temperature 1; the critics' part of the optimiser goes on."""
        nn.init.zeros_(self.log_alpha["sac"])
        self.new_actor_optimizers(self.args.slow_lr)

    def ramp_model(self, step):
        """Adam begins anew with the game, and its first steps have full length whatever the gradient: without a ramp the fit is lost."""
        for group in self.adversary_opt.param_groups[1:]:
            group["lr"] = self.args.fast_lr * min(1, (step + 1) / self.args.model_ramp)

    def bellman(self, obs, act, rew, next_obs, terminated, others=()):
        """E^w of both critics, (2,), and their values of the rows' actions and of the `others` at the same states, (2, B) each."""
        with self.autocast():
            mean, log_std = self.policy(next_obs)
            next_act, _ = squash(mean, log_std, torch.randn_like(mean))
            states = torch.cat([obs, next_obs, *[obs] * len(others)])
            q, next_q, *q_others = self.qf(states, torch.cat([act, next_act, *others])).split(len(obs), 1)
            next_target = self.target_qf(next_obs, next_act)
        discount = self.args.gamma * (1 - terminated)
        target_q = rew + discount * next_target.amin(0).clamp(*self.values)
        return bellman_error(q, rew + discount * next_q, target_q, self.args.target_weight), q, *q_others

    def adversary_loss(self, obs, act, pi_act, ref_act, rew, next_obs, terminated, known):
        """l^adversary, summed over f_1 and f_2 (Eq. 4). obs, act: the pairs of D_M, first those of the data, whose rew, next_obs,
        terminated and known (is the successor recorded, and not held out?) follow; ref_act None: the data's actions."""
        n, fit, metrics = len(rew), 0.0, {}
        if self.dynamics is not None:
            mean, logvar = gaussian(self.dynamics, obs, act)
            fit = data_fit(mean[:n], logvar[:n], obs[:n], rew, next_obs, known, self.v_max)
            rew, next_obs = mean[:, 0], obs + mean[:, 1:] + (0.5 * logvar[:, 1:]).exp() * torch.randn_like(obs)  # D_M, l. 4
            terminated = self.terminates(obs, act, next_obs).float()
            metrics = {"losses/data_fit": fit.detach()}
        bellman, q, q_pi, *q_ref = self.bellman(obs, act, rew, next_obs, terminated, [pi_act] if ref_act is None else [pi_act, ref_act])
        q_ref = q_ref[0] if q_ref else q
        relative = (q_pi - q_ref).mean(1)  # L, (2,)
        loss = normalized_sum(relative, bellman + self.args.fit_weight * fit, self.beta).sum()
        metrics |= {"losses/adversary": loss, "losses/bellman": bellman.mean(), "losses/relative": relative[0]}
        metrics |= {"q/data": q[:, :n].mean(), "q/policy": q_pi.mean(), "q/reference": q_ref.mean()}
        return loss, {k: v.detach() for k, v in metrics.items()}

    def policy_loss(self, obs, act, log_prob, alpha):
        """l^actor with its entropy bonus (Eq. 5); f_1(s, pi_ref) does not depend on the policy and is left out."""
        with self.autocast():
            q = self.qf.q1(torch.cat([obs, act], -1))
        return normalized_sum(-q.mean(), log_prob.mean(), alpha)

    def step_critics(self, loss, inputs):
        """Step, projection, targets; returns the largest norm of a layer."""
        descend(self.adversary_opt, loss, inputs)
        with torch.no_grad():  # or the targets would join the graph of the critics
            norms = project(self.projected, self.args.weight_norm)
            torch._foreach_lerp_(list(self.target_qf.parameters()), list(self.qf.parameters()), self.args.tau)
        return norms.amax()

    def step_alpha(self, log_prob):
        """A step of the temperature towards the target entropy; returns it."""
        descend(self.alpha_opt, -self.log_alpha["sac"] * (log_prob.detach().mean() + self.target_entropy))
        return self.log_alpha["sac"].detach().exp()

    def warm_up(self, obs, act, rew, next_obs, terminated, cloned):
        """Warm start: critics by E^w on given transitions; temperature, and policy by the likelihood of the `cloned` actions, with
        entropy, unless that is None."""
        if self.args.compile:
            torch.compiler.cudagraph_mark_step_begin()
        bellman, q = self.bellman(obs, act, rew, next_obs, terminated)
        self.step_critics(bellman.sum(), list(self.qf.parameters()))
        metrics = {"losses/bellman": bellman.detach().mean(), "q/batch": q.detach().mean()}
        if cloned is None:
            return metrics
        with self.autocast():
            mean, log_std = self.policy(obs)
        _, log_prob = squash(mean, log_std, torch.randn_like(mean))
        alpha = self.step_alpha(log_prob)
        clone_loss = -squashed_log_prob(mean, log_std, cloned).mean()
        descend(self.policy_opt, normalized_sum(clone_loss, log_prob.mean(), alpha))
        return metrics | {"losses/clone": clone_loss.detach()}

    def update(self, obs, act, rew, next_obs, terminated, known=None, pairs=None):
        """Adversary, targets, temperature, policy, in this order (Alg. 1, l. 4-6), from rows of the data and pairs (s, a) of D_model;
        returns metrics, which the next update may overwrite."""
        if self.args.compile:
            torch.compiler.cudagraph_mark_step_begin()
        if pairs is not None:
            obs, act = torch.cat([obs, pairs[:, : obs.shape[1]]]), torch.cat([act, pairs[:, obs.shape[1] :]])
        with self.autocast():
            mean, log_std = self.policy(obs)
            pi_act, log_prob = squash(mean, log_std, torch.randn_like(mean))
            ref_act = None if self.reference is None else self.reference.sample(obs)
        loss, metrics = self.adversary_loss(obs, act, pi_act.detach(), ref_act, rew, next_obs, terminated, known)  # l. 5
        model = [*self.dynamics.weight, *self.dynamics.bias] if self.dynamics is not None and self.args.bellman_weight else []
        norm = self.step_critics(loss, [*self.qf.parameters(), *model])  # both gradients, then both steps
        alpha = self.step_alpha(log_prob)  # Proj_Pi
        policy_loss = self.policy_loss(obs, pi_act, log_prob, alpha)  # l. 6
        descend(self.policy_opt, policy_loss, inputs=list(self.policy.parameters()))  # the critics get no gradient from it
        metrics |= {"losses/policy": policy_loss.detach(), "q/entropy": -log_prob.detach().mean(), "q/alpha": alpha}
        return metrics | {"q/weight_norm": norm}

    @torch.no_grad()
    def act(self, obs):
        """obs (B, O) -> deterministic actions (B, A), on the CPU"""
        return self.policy(obs.to(self.device))[0].tanh().cpu()

    PARTS = ("policy", "qf", "target_qf", "log_alpha", "policy_opt", "alpha_opt", "adversary_opt")

    def state_dict(self):
        return {k: getattr(self, k).state_dict() for k in self.PARTS}

    def load_state_dict(self, state):
        for k in self.PARTS:
            getattr(self, k).load_state_dict(state[k])


def warm_start_key(args, data, model):
    """Everything that decides a warm start; one on the data alone is the same with a model and without, and `model` empty."""
    decisive = ("seed", "bf16", "warm_start_updates", "clone", "batch_size", "hidden", "gamma", "tau", "fast_lr", "target_entropy")
    decisive += ("target_weight", "clip_v", "weight_norm")
    decisive += ("model_ratio", "pairs_kept", "rollout_margin", "horizon") if model else ()
    cloned = None if args.clone == "data" else data.more_facts["reference"]
    return json.loads(json.dumps(model | {k: getattr(args, k) for k in decisive} | {"data": data.sha256, "cloned": cloned}))


def warm_start_of_another_run(args, key):
    """Policy and critics as the run in --warm-start-from had them before its game: making them here again would take 100 000 updates
    and, on the same device with as many threads, give the same bits."""
    flag, path = f"--warm-start-from {args.warm_start_from}:", Path(args.warm_start_from) / "checkpoint.pt"
    if not path.is_file():
        raise UserError(f"{flag} no checkpoint.pt there (a run that is past its warm start goes on without the flag)")
    state = load_checkpoint(path)
    if "warm_start_key" not in state:
        raise UserError(f"{flag} its warm start is not over, or it is no run of armor.py")
    theirs = state["warm_start_key"]
    short = lambda x: x[:12] if isinstance(x, str) else x  # noqa: E731  # of a sha256 the beginning
    if differ := [f"{k} ({short(theirs.get(k))}, here {short(key.get(k))})" for k in sorted(key | theirs) if key.get(k) != theirs.get(k)]:
        raise UserError(f"{flag} its warm start has another {', '.join(differ)}")
    return state["warm_start"]


def warm_start(agent, rows, reference, args, run, key, taken, rollouts):
    """The policy becomes a clone of the data or of the given reference, or stays its copy; the critics learn its values, from rows of the
    data and, if there are `rollouts`, of the fitted model. Or all of it is `taken` over."""
    sizes, step = (agent.policy.net[0].in_features, agent.policy.net[-1].out_features // 2), 0
    if taken:
        agent.load_warm_start(taken)
        step = args.warm_start_updates
    elif run.state.get("phase") == "warm_start":
        agent.load_state_dict(run.state["agent"])
        step = run.state["step"]
        run.restore_rng()
        if rollouts:
            rollouts.load_state_dict(run.state.pop("rollouts"))
    num_model = round(args.model_ratio * args.batch_size) if rollouts else 0
    bar = progress(args.warm_start_updates, "warm start", "update", step)
    while step < args.warm_start_updates:
        batch = unpack(rows[torch.randint(len(rows), (args.batch_size - num_model,), device=rows.device)], *sizes)
        if rollouts:
            imagined, starts = rollouts.transitions(num_model, agent.dynamics), batch[0]
            batch = [torch.cat(x) for x in zip(batch, imagined, strict=True)]
            rollouts.advance(step, starts, agent.policy, reference, agent.dynamics)
        cloned = batch[1] if args.clone == "data" else None
        if args.clone == "reference":
            cloned = reference.sample(batch[0])
        metrics = agent.warm_up(*batch, cloned)
        step += 1
        bar.update()
        if step % args.log_every == 0 or step % args.checkpoint_every == 0:
            run.log(0, {"model/warm_start_update": step} | metrics)
            bar.set_postfix({k.removeprefix("losses/"): f"{v:.4g}" for k, v in metrics.items() if k.startswith("losses/")})
        if step % args.checkpoint_every == 0:
            run.save("warm_start", step, agent=agent.state_dict(), rollouts=rollouts.state_dict() if rollouts else None)
    bar.close()
    kept = agent.warm_start_state()
    agent.begin_game()
    run.save("policy", 0, agent=agent.state_dict(), rollouts=None, clone=kept["policy"], warm_start=kept, warm_start_key=key)


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


def main(args):
    task = parse_task(args.env)
    args = resolve(args, task)
    device = pick_device(args.device)
    data = load_dataset(task, args.dataset)
    num_model = round(args.model_ratio * args.batch_size)
    num_real = args.batch_size - num_model
    if num_model and data.has_next.sum() < 10:
        raise UserError(f"--dataset {args.dataset}: too few transitions with a known successor to train a model")
    key = model_key("forward", args, data) | {"ensemble_size": 1, "num_elites": 1}
    given = model_of_another_run(args, key) if args.dynamics_from and num_model else None
    reference = None if args.reference in ("bc", "data") else given_reference(args, data, task.domain).to(device)
    imagines = num_model and args.clone != "data"  # in the warm start
    warm_key = warm_start_key(args, data, key if imagines else {})
    warm_given = warm_start_of_another_run(args, warm_key) if args.warm_start_from else None
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
    rows = pack(data.obs, data.act, data.rew, data.next_obs, data.terminated).to(device)
    known, game = data.has_next.float().to(device), {"values": value_range(data.rew, args.gamma)}
    if num_model:
        dynamics = fitted_dynamics(data, args, device, run, key, given)
        run.state["dynamics"] = {k: v.clone() for k, v in run.state["dynamics"].items()}  # as it was fitted: the game changes M itself
        some = known.nonzero().squeeze(1)  # the guard: rows that the fit held out, and that E_D leaves out as well
        order = torch.randperm(len(some), generator=torch.Generator().manual_seed(args.seed)).to(device)  # as in train_dynamics
        held_out = some[order[: max(1, min(int(args.holdout_ratio * len(some)), args.holdout_max))]]
        known[held_out] = 0
        probe = unpack(rows[held_out], obs_dim, act_dim)[:4]
        original = Dynamics(obs_dim, act_dim, args).to(device)
        original.load_state_dict(run.state["dynamics"])
        fitted = model_fit(original, *probe)
        v_max = fitted["model/reward_error"].clamp(min=1e-3) if args.v_max is None else args.v_max
        game |= {"dynamics": dynamics, "terminates": termination_fn(task, data), "v_max": v_max}
    torch.manual_seed(4 * args.seed + 1)  # with and without model the game beside a clone begins with the same policy and critics
    if args.clone == "copy":
        game["policy"] = Policy(obs_dim, act_dim, [layer.out_features for layer in reference.net if hasattr(layer, "out_features")][:-1])
        game["policy"].load_state_dict(reference.state_dict())
        least = entropy(game["policy"], data.obs[:: max(1, len(data) // 20_000)])
    agent = ARMOR(obs_dim, act_dim, args, device, **game)
    if args.clone == "copy" and args.target_entropy is None:  # pi_ref is to be among the policies that Proj_Pi allows
        agent.target_entropy = min(agent.target_entropy, least)
    new_rollouts = partial(Rollouts, data.obs, act_dim, num_real, agent.terminates, args, device)
    if "clone" in run.state:
        agent.load_state_dict(run.state["agent"])
    else:
        warm_start(agent, rows, reference, args, run, warm_key, warm_given, new_rollouts() if imagines else None)
    reference = reference or Reference({"policy": run.state["clone"]}).to(device)
    agent.reference = None if args.reference == "data" else reference
    if args.eval_episodes and "reference_discounted" not in run.state:  # J(pi_ref) in the episodes of every evaluation
        rewards = []
        returns, _ = evaluate(envs, lambda obs: reference.best(obs.to(device)).cpu(), 1000 * args.seed + 100, rewards=rewards)
        discounted = float(np.mean([r @ args.gamma ** np.arange(len(r)) for r in rewards]))
        run.state |= {"reference_return": returns.mean().item(), "reference_discounted": discounted}
    torch.manual_seed(4 * args.seed + 3)
    rollouts, step = new_rollouts() if num_model else None, run.state["step"]
    if step:
        run.restore_rng()
        if num_model:
            rollouts.load_state_dict(run.state.pop("rollouts"))

    some_obs = data.obs[:: max(1, len(data) // 2_000)].to(device)
    bar, score = progress(args.total_updates, args.exp_name, "update", step), None
    begin, mark = (step, time.time()), (step, time.time())
    while step < args.total_updates:  # l. 2
        idx = torch.randint(len(rows), (num_real,), device=device)
        batch = unpack(rows[idx], obs_dim, act_dim)  # l. 3: of the data; those of D_model are the pairs
        if num_model:
            agent.ramp_model(step)
            pairs = rollouts.sample(num_model)
            metrics = agent.update(*batch, known[idx], pairs)  # l. 4-6
            rollouts.advance(step, batch[0], agent.policy, reference, dynamics)  # l. 7-8
        else:
            metrics = agent.update(*batch)
        step += 1
        bar.update()
        save = step % args.checkpoint_every == 0 or step == args.total_updates
        if step % args.log_every == 0 or save:
            sps, mark = (step - mark[0]) / (time.time() - mark[1]), (step, time.time())
            metrics["q/policy_shift"] = (agent.act(some_obs) - reference.best(some_obs).cpu()).abs().mean()
            metrics["q/target_entropy"] = agent.target_entropy
            if num_model:
                metrics |= rollouts.report() | model_fit(dynamics, *probe) | {f"{k}_fitted": v for k, v in fitted.items()}
                metrics |= model_shift(dynamics, original, rollouts, agent)
            run.log(step, metrics | {"charts/SPS": sps})
            shown = {k.removeprefix("losses/"): f"{v:.4g}" for k, v in metrics.items() if k.startswith("losses/")}
            bar.set_postfix(shown | ({} if score is None else {"score": score}))
        due = step % args.eval_every == 0 or step == args.total_updates
        if num_model and due:
            run.log(step, return_shift(dynamics, original, some_obs[:: max(1, len(some_obs) // 256)], agent, game["values"]))
        if args.eval_episodes and due:
            score = round(run.evaluate(step, envs, agent.act), 1)
            full, discounted, now = run.state["reference_return"], run.state["reference_discounted"], run.evals[-1]
            ref = {"return": full, "normalized_score": normalized_score(task, full), "discounted_return": discounted}
            ref |= {"improvement": now["return"] - full, "discounted_improvement": now["discounted_return"] - discounted}
            run.log(step, {f"reference/{k}": v for k, v in ref.items()})  # beside eval/return
        if save:
            model = dynamics.parameters() if num_model else ()
            if not all(p.isfinite().all() for p in (*agent.policy.parameters(), *agent.qf.parameters(), *model)):
                raise UserError(f"weights not finite at update {step}; {run.folder} keeps its last good checkpoint", status=3)
            run.save("policy", step, agent=agent.state_dict(), rollouts=rollouts.state_dict() if num_model else None)
    bar.close()
    trained = step - begin[0]  # in this process; nothing is left where a run was killed just before its end
    gains = {"improvement": ("return", "reference_return"), "discounted_improvement": ("discounted_return", "reference_discounted")}
    gain = {k: run.evals[-1][own] - run.state[given] for k, (own, given) in gains.items()} if run.evals else {}
    more = {"reference_return": run.state["reference_return"]} | gain if args.eval_episodes else {}
    run.finish(step, trained / (time.time() - begin[1]) if trained else step / (run.elapsed + 1e-9), **more)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__.split("\n")[0] + " Equations and symbols: the docstring at the top of the file."))
    except UserError as e:
        sys.exit(e.report())
    except KeyboardInterrupt:
        tqdm.write("interrupted; the same command goes on from the last checkpoint, if there is one", file=sys.stderr)
        sys.exit(130)
