"""COMBO: conservative offline model-based policy optimisation, CQL's pessimism on data and model rollouts.

Paper: Yu et al. 2021, arXiv:2102.08363; lines are those of its Algorithm 1. No code by the authors is known.

  model        p(s', r | s, a): ensemble of N Gaussians                      maximum likelihood on the data     l. 1
  rollouts     a ~ mu(.|s), (s', r) ~ p_i(.|s, a), then s <- s', h times, from states of the data               l. 4
               mu: the policy, or uniform on [-1, 1]^A
  Q functions  min_Q beta (E_rho[Q(s, a)] - E_data[Q(s, a)]) + 1/2 E_df[(Q - B Q_target)^2]              Eq. 2; l. 5
               rho(a|s) = exp Q / sum_a exp Q; with rho fixed, E_rho[Q] has the gradient of log sum_a exp Q   CQL Eq. 4
               data: real transitions only; d_f: batches with a share eta = 1 - f of imagined ones
  policy       max_pi E_df[min_j Q_j(s, a) - alpha log pi(a|s)], a ~ pi(.|s)                             Eq. 3; l. 6

    python algorithms/combo.py --env hopper-medium-replay
    python algorithms/combo.py --env hopper-medium-replay --beta 0         # no conservative term
    python algorithms/combo.py --env hopper-medium-replay --model-ratio 0  # no model: CQL with COMBO's beta

Two presets. v0: the paper's settings; only beta and learning rates are verified, as we did not have the appendix.
v2 (default): those of yihaosun1124/OfflineRL-Kit, for v2 data: mu is the policy, rho covers all states of a batch.

Differences from the paper, and from OfflineRL-Kit:
  1. log sum_a exp Q runs over all 3N sampled actions of a state; in OfflineRL-Kit, the source of v2's beta, over 3.
  2. Like OfflineRL-Kit, we do not halve TD errors, so beta is half as strong as in Eq. 2.
  3. The policy trains on all states of a batch, as in l. 6, even if rho covers only imagined ones (Eq. 3: s of rho).
  4. The policy maximises the smaller of two Q values plus entropy, as in SAC; no entropy in the backup (Eq. 2).
  5. The Q functions step before the policy, as in l. 5, 6 (OfflineRL-Kit: after). log(1 - a^2): without + 1e-6.
  6. Transitions without a recorded successor train the learner, but not the model. OfflineRL-Kit drops them.
  7. OfflineRL-Kit ends hopper only above 100, not below -100, and also halfcheetah and walker2d beyond +-100.
  8. v2: the cosine spans --policy-lr-decay updates, not the run, so that a run can be continued up to there.
"""

import copy
import math
import sys
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
import tyro
from pydantic import Field, FiniteFloat, NonNegativeInt, PositiveInt
from torch import nn

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # after the script's folder, so copied modules come first
import plumbing
from plumbing import Decays, Episodes, Name, NonNegative, Positive, Seed, Share, UserError
from utils import check_ends, evaluate, load_dataset, make_env, pack, parse_task, unpack


@dataclass
class Args:
    # --- experiment ---
    env: Annotated[str, tyro.conf.arg(aliases=["--env-id"])] = "hopper-medium-replay"  # D4RL task or Minari id
    exp_name: Name | None = None  # None: combo; combo_beta0 if --beta 0; combo_cql without model; preset v0: ..._v0
    preset: Literal["v2", "v0"] = "v2"  # for settings that are None: OfflineRL-Kit's (v2) or the original ones (v0)
    seed: Seed = 0
    total_updates: PositiveInt = 1_000_000  # gradient updates of the learner
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    num_threads: PositiveInt | None = None  # CPU threads; None: all cores
    compile: bool = False  # torch.compile the losses; on a GPU with CUDA graphs
    bf16: bool = False  # bfloat16 for Q of the penalty's 3N actions, most of an update's time
    run_dir: str = "runs"  # folder of all runs
    checkpoint_every: PositiveInt = 10_000  # updates; dynamics training saves once per epoch

    # --- logging ---
    track: bool = False  # also log to Weights & Biases
    wandb_project_name: str = "rewind"
    wandb_entity: str | None = None
    wandb_group: str | None = None  # None: task and algorithm
    log_every: PositiveInt = 1_000  # updates

    # --- data and evaluation ---
    dataset: str = "auto"  # auto, d4rl, bundled, generated, a Minari id, or the path of an HDF5 file in D4RL layout
    eval_every: PositiveInt = 5_000  # updates
    eval_episodes: Episodes = 10  # per evaluation (use 100 for antmaze), greedy; 0: no simulator

    # --- dynamics ---
    ensemble_size: PositiveInt = 7  # ensemble members
    num_elites: PositiveInt = 5  # the best on the holdout set; only these generate rollouts
    dynamics_hidden: PositiveInt = 200  # width of the 4 hidden layers
    dynamics_bf16: bool = False  # bfloat16 in the model's hidden layers
    dynamics_lr: Positive = 1e-3
    dynamics_batch_size: PositiveInt = 256
    dynamics_weight_decay: Decays = (2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4)  # L2, per layer
    dynamics_max_epochs: PositiveInt | None = None  # None: until the holdout error stops improving
    dynamics_patience: NonNegativeInt = 5  # stop if no member improves by 1 % for more epochs than this
    dynamics_from: str | None = None  # dynamics.pt of a run with the same data, seed and model settings
    holdout_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.2  # share of transitions held out
    holdout_max: PositiveInt = 1_000  # maximum number of held-out transitions

    # --- rollout ---
    horizon: PositiveInt | None = None  # rollout length (h); None: by task
    model_ratio: Share | None = None  # share of imagined transitions per batch (eta); 0: no model; None: by task
    rollout_every: PositiveInt = 1_000  # updates between rounds of rollouts
    rollout_starts: PositiveInt = 50_000  # start states per round
    rollouts_kept: PositiveInt = 5  # rounds kept in the buffer
    imagined_ends: bool = True  # rollouts end by the environment's termination rule; if off, never
    rollout_policy: Literal["policy", "uniform"] | None = None  # mu, the source of imagined actions; None: by task

    # --- learner ---
    batch_size: PositiveInt = 256  # real and imagined transitions together
    gamma: Share = 0.99  # discount
    tau: Share = 0.005  # target network update rate
    hidden: tuple[PositiveInt, ...] = (256, 256, 256)  # hidden layer sizes of policy and Q functions
    qf_lr: Positive | None = None  # None: 3e-4; 1e-4 for walker2d in v0
    policy_lr: Positive | None = None  # policy and temperature; None: 1e-4; 1e-5 for walker2d in v0
    policy_lr_decay: NonNegativeInt | None = None  # updates of cosine decay to 0; 0: constant; None: by --preset
    target_entropy: FiniteFloat | None = None  # None: minus the number of action dimensions
    beta: NonNegative | None = None  # weight of the conservative term; None: by task
    rho_states: Literal["mix", "model"] | None = None  # where Q is pushed down: all or imagined states; None: by task
    cql_samples: PositiveInt = 10  # actions per source (N): uniform, pi(.|s), pi(.|s')
    cql_temperature: Positive = 1.0


# Horizon h, beta, mu, states of rho, eta. v0: the paper; beta and rates as in d3rlpy's reproduction; v2:
# OfflineRL-Kit, run_combo.py; "ours" is in neither. The longest key that is a prefix of the task's name applies.
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
        "halfcheetah-jump": (5, 0.5, "policy", "mix", 0.5),  # ours, like the two rows below
        "ant-angle": (5, 0.5, "policy", "mix", 0.5),
        "": (1, 1.0, "policy", "mix", 0.5),
    },
    "v2": {
        "halfcheetah-random": (5, 0.5, "policy", "mix", 0.5),  # random is not in OfflineRL-Kit: beta as in v0
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
        "halfcheetah-jump": (5, 0.5, "policy", "mix", 0.5),  # ours, like the two rows below
        "ant-angle": (5, 0.5, "policy", "mix", 0.5),
        "": (1, 1.0, "policy", "mix", 0.5),
    },
}


# --- networks ---


class Float32Linear(nn.Linear):
    """Stays in float32 under autocast: bfloat16 has steps of 0.06 at a position of 9 m, and of 0.5 at Q = 100."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


def mlp(*sizes):
    """ReLU network whose first and last layers stay in float32."""
    linear = [nn.Linear if 0 < i < len(sizes) - 2 else Float32Linear for i in range(len(sizes) - 1)]
    layers = [f(n, m) for f, n, m in zip(linear, sizes, sizes[1:], strict=False)]
    return nn.Sequential(*[x for layer in layers for x in (layer, nn.ReLU(inplace=True))][:-1])


def squash(mean, log_std, noise):
    """Tanh of a Gaussian sample, and its log-density: (..., A) -> (..., A), (...)"""
    pre_tanh = mean + log_std.exp() * noise
    log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    log_prob = log_prob - 2 * (math.log(2) - pre_tanh - F.softplus(-2 * pre_tanh))  # - log(1 - a^2), never log 0
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
    """Q_1(s, a) and Q_2(s, a)."""

    def __init__(self, obs_dim, act_dim, hidden):
        super().__init__()
        self.q1 = mlp(obs_dim + act_dim, *hidden, 1)
        self.q2 = mlp(obs_dim + act_dim, *hidden, 1)

    def forward(self, obs, act):
        """obs (..., O), act (..., A) -> (2, ...)"""
        x = torch.cat([obs, act], -1)
        rows = x.flatten(0, -2)  # 2-D: with more dimensions autograd copies at every in-place ReLU
        return torch.stack([self.q1(rows), self.q2(rows)]).view(2, *x.shape[:-1])


def descend(opt, loss):
    """One gradient step on the optimizer's parameters; no other parameter gets a gradient."""
    opt.zero_grad()
    loss.backward(inputs=[p for group in opt.param_groups for p in group["params"]])
    opt.step()


# --- dynamics model ---


class Dynamics(nn.Module):
    """Ensemble of E networks, each a Gaussian over reward and state change (sizes and bounds: tianheyu927/mopo).
    A forward model p(s', r | s, a) predicts s' from s, a reverse model p(s, r | s', a) s from s': `pred` from `cond`.
    """

    def __init__(self, obs_dim, act_dim, args):
        super().__init__()
        self.args, sizes = args, [obs_dim + act_dim] + 4 * [args.dynamics_hidden] + [2 * (obs_dim + 1)]
        self.weight, self.bias = nn.ParameterList(), nn.ParameterList()
        for n, m in zip(sizes, sizes[1:], strict=False):
            w, std = torch.empty(args.ensemble_size, n, m), 0.5 / n**0.5
            self.weight.append(nn.init.trunc_normal_(w, std=std, a=-2 * std, b=2 * std))
            self.bias.append(torch.zeros(args.ensemble_size, 1, m))
        self.max_logvar = nn.Parameter(torch.full((obs_dim + 1,), 0.5))
        self.min_logvar = nn.Parameter(torch.full((obs_dim + 1,), -10.0))
        self.register_buffer("mean", torch.zeros(obs_dim + act_dim))
        self.register_buffer("std", torch.ones(obs_dim + act_dim))
        self.register_buffer("best_mse", torch.full((args.ensemble_size,), 1e38))  # on the holdout set
        self.register_buffer("best_epoch", torch.zeros(args.ensemble_size, dtype=torch.long))

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
        """Twice the negative log-likelihood, without its constant: mean over rows and outputs, sum over members."""
        mean, logvar = self(x)
        nll = ((mean - target).square() * (-logvar).exp() + logvar).mean((1, 2)).sum()
        return nll + 0.01 * (self.max_logvar.sum() - self.min_logvar.sum())  # keeps the bounds tight

    @property
    def elites(self):
        return self.best_mse.argsort()[: self.args.num_elites]

    @torch.no_grad()
    def sample(self, cond, act):
        """pred and r from a random elite per row: (B, O), (B, A) -> (B, O), (B,)"""
        x, elites = self.inputs(cond, act), self.elites
        chosen = elites[torch.randint(len(elites), (len(x),), device=x.device)]
        out = torch.randn(len(x), cond.shape[1] + 1, device=x.device)
        for e in elites.tolist():
            rows = (chosen == e).nonzero().squeeze(1)
            mean, logvar = self(x[rows].unsqueeze(0), slice(e, e + 1))
            out[rows] = mean[0] + (0.5 * logvar[0]).exp() * out[rows]
        return cond + out[:, 1:], out[:, 0]

    @torch.no_grad()
    def keep_best(self, current, mse, epoch):
        """Copy members of `current` whose holdout MSE (E,) improved by over 1 %, and always the variance bounds."""
        improved = mse < 0.99 * self.best_mse
        for kept, p in zip([*self.weight, *self.bias], [*current.weight, *current.bias], strict=True):
            kept[improved] = p[improved]
        self.best_mse[improved], self.best_epoch[improved] = mse[improved], epoch
        self.max_logvar.copy_(current.max_logvar)
        self.min_logvar.copy_(current.min_logvar)

    def optimizer(self):
        """Adam with weight decay adds wd W to the gradient, as MOPO's loss term wd/2 |W|^2 does."""
        decays = zip(self.weight, self.args.dynamics_weight_decay, strict=True)
        groups = [{"params": [w], "weight_decay": wd} for w, wd in decays]
        groups.append({"params": [*self.bias, self.max_logvar, self.min_logvar]})
        return torch.optim.Adam(groups, lr=self.args.dynamics_lr, fused=True)


def train_dynamics(cond, act, rew, pred, args, run):
    """Maximum likelihood, until the holdout error of every member has stopped improving."""
    device, E = cond.device, args.ensemble_size
    generator = torch.Generator().manual_seed(args.seed)  # a resumed run repeats split and bootstraps
    order = torch.randperm(len(act), generator=generator).to(device)
    num_holdout = max(1, min(int(args.holdout_ratio * len(act)), args.holdout_max))
    holdout, train = order[:num_holdout], order[num_holdout:]
    N = len(train)
    bootstrap = (torch.randint(N, (E, N), generator=generator) if E > 1 else torch.arange(N)[None]).to(device)
    current = Dynamics(cond.shape[1], act.shape[1], args).to(device)
    x, y = torch.cat([cond, act], -1), torch.cat([rew[:, None], pred - cond], -1)
    mean, std = x[train].mean(0), x[train].std(0, unbiased=False)
    current.mean.copy_(mean)
    current.std.copy_(torch.where(std < 1e-6 * (1 + mean.abs()), 1.0, std))  # 1 for constant columns
    x = current.inputs(cond, act)
    dynamics, opt = copy.deepcopy(current), current.optimizer()  # `dynamics` keeps each member's best epoch
    loss_fn = torch.compile(current.loss) if args.compile else current.loss
    for epoch in run.steps("dynamics", args.dynamics_max_epochs, 1, dynamics=dynamics, current=current, opt=opt):
        if epoch - 1 - dynamics.best_epoch.max() > args.dynamics_patience:
            break
        shuffle = torch.stack([torch.randperm(N, device=device) for _ in range(E)])
        rows = train[bootstrap.gather(1, shuffle)]  # (E, N): each member's bootstrap, reshuffled
        batches = rows.split(args.dynamics_batch_size, 1)
        for idx in plumbing.bar(batches, f"epoch {epoch} (best {dynamics.best_epoch.max()})"):  # (E, B)
            loss = loss_fn(x[idx], y[idx])
            descend(opt, loss)
        with torch.no_grad():
            mean, logvar = current(x[holdout].expand(E, -1, -1))
        mse = (mean - y[holdout]).square().mean((1, 2))  # (E,)
        dynamics.keep_best(current, mse, epoch)
        fit = {"holdout_mse": mse.mean(), "elite_mse": dynamics.best_mse[dynamics.elites].mean()}
        fit |= {"expected_mse": logvar.exp().mean()}  # predicted variance; rollouts are noise if far above holdout_mse
        fit |= {"explained_variance": 1 - fit["elite_mse"] / y[holdout].var(0, unbiased=False).mean()}
        run.log(0, {"model/epoch": epoch, "losses/dynamics": loss} | {f"model/{k}": v for k, v in fit.items()})
    return dynamics


@torch.no_grad()
def model_error(dynamics, act, episodes, horizon):
    """Root mean squared error of the elites' mean prediction on the policy's real episodes, (T+1, O) each, after one
    step and after `horizon` steps with the same actions, in units of the states' standard deviation."""
    device, metrics = dynamics.mean.device, {}
    for steps in sorted({1, horizon}):
        errors = []
        for truth in (torch.from_numpy(x).to(device) for x in episodes if len(x) > steps):
            obs, acts = truth[:-steps], act(truth[:-1]).to(device)  # deterministic: the actions that were taken
            for k in range(steps):
                x = dynamics.inputs(obs, acts[k : k + len(obs)])
                mean, _ = dynamics(x.expand(len(dynamics.elites), -1, -1), dynamics.elites)
                obs = obs + mean.mean(0)[:, 1:]
            errors.append((obs - truth[steps:]) / dynamics.std[: obs.shape[1]])
        if errors:
            metrics[f"model/true_error_{steps}"] = torch.cat(errors).square().mean().sqrt()
    return metrics


# --- rollout ---


def termination_fn(task, data, args):
    """Returns the termination rule of Gymnasium's v4 or D4RL's antmaze: (obs, act, next_obs) -> (B,) bool."""
    domain = task.domain if args.imagined_ends else "none"
    goal = data.goal() if domain == "antmaze" else None

    def terminates(obs, act, next_obs):
        height, finite = next_obs[:, 0], next_obs.isfinite().all(-1)  # column 1: the angle of the torso
        if domain == "hopper":
            return ~(finite & (next_obs[:, 1:].abs() < 100).all(-1) & (height > 0.7) & (next_obs[:, 1].abs() < 0.2))
        if domain == "walker2d":
            return ~((height > 0.8) & (height < 2.0) & (next_obs[:, 1].abs() < 1.0))
        if domain == "ant":
            return ~(finite & (height >= 0.2) & (height <= 1.0))
        if domain == "antmaze":
            return (next_obs[:, :2] - goal.to(next_obs.device)).norm(dim=-1) <= 0.5
        return torch.zeros_like(finite)  # halfcheetah, maze2d and unknown environments never terminate

    check_ends(terminates, domain, data)
    return terminates


def draw(rows, size):
    """`size` of the rows (N, ...), sampled uniformly with replacement"""
    return rows[torch.randint(len(rows), (size,), device=rows.device)]


@torch.no_grad()
def imagine(starts, dynamics, policy, terminates, args):
    """Rollouts from `rollout_starts` states drawn from `starts` (N, O) (Alg. 1, l. 4). Returns rows (M, 2 O + A + 2),
    M at most horizon x rollout_starts, and metrics."""
    obs = draw(starts, args.rollout_starts)
    rows = []
    for _ in range(args.horizon):
        policy_mean, log_std = policy(obs)
        act, _ = squash(policy_mean, log_std, torch.randn_like(policy_mean))
        act = 2 * torch.rand_like(act) - 1 if args.rollout_policy == "uniform" else act
        next_obs, rew = dynamics.sample(obs, act)  # a random elite per row
        terminated = terminates(obs, act, next_obs)
        rows.append(pack(obs, act, rew, next_obs, terminated))
        obs = next_obs[~terminated]  # a rollout that ended stays ended
    rows = torch.cat(rows)
    _, _, rew, _, terminated = unpack(rows, obs.shape[1], act.shape[1])
    stats = {"imagined_reward_min": rew.min(), "imagined_reward_max": rew.max(), "imagined_reward_mean": rew.mean()}
    stats |= {"imagined_terminated": terminated.mean()}
    return rows, {f"model/{k}": v for k, v in stats.items()}


class ModelBuffer:
    """D_model: the last rounds of rollouts. Its state dict holds policies instead of rows: each round has its own seed,
    so a resumed run imagines the same rows again."""

    def __init__(self, starts, dynamics, terminates, args):
        self.starts, self.dynamics, self.terminates, self.args = starts, dynamics, terminates, args
        self.rollouts = deque(maxlen=args.rollouts_kept)  # of each round: step, weights of the policy, rows

    def add(self, step, weights):
        """Adds a round by the policy with these weights (a state dict), drops the oldest if full; returns metrics."""
        obs_dim, device = self.starts.shape[1], self.starts.device
        with torch.random.fork_rng([] if device.type == "cpu" else [device]):  # leaves the learner's random state alone
            torch.manual_seed(1_000_000 * (4 * self.args.seed + 2) + step // self.args.rollout_every)
            policy = Policy(obs_dim, len(self.dynamics.mean) - obs_dim, self.args.hidden).to(device)
            policy.load_state_dict(weights)
            rows, stats = imagine(self.starts, self.dynamics, policy, self.terminates, self.args)
        if not rows.isfinite().all():
            raise UserError("imagined rows are not finite: the model diverged; try a shorter --horizon", status=3)
        self.rollouts.append((step, policy.state_dict(), rows))
        self.rows = torch.cat([rows for _, _, rows in self.rollouts])
        return stats

    def state_dict(self):
        return {"rollouts": [(step, weights) for step, weights, _ in self.rollouts]}

    def load_state_dict(self, state):
        for step, weights in state["rollouts"]:
            self.add(step, weights)


# --- learner ---


def soft_maximum(q_sampled, log_density, temperature=1.0):
    """log sum_a exp Q(s, a) by importance sampling over 3N actions (CQL Eq. 4), up to log 3N.

    q_sampled (2, B, 3N), log_density (B, 3N) of the distribution each action was sampled from -> (2, B)
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
        self.alphas = nn.ParameterDict({"sac": torch.zeros(())}).to(device)  # logarithm of SAC's temperature
        self.target_entropy = -float(act_dim) if args.target_entropy is None else args.target_entropy
        adam = dict(fused=True, capturable=device.type == "cuda")
        self.qf_opt = torch.optim.Adam(self.qf.parameters(), lr=args.qf_lr, **adam)
        groups = [{"params": list(part.parameters())} for part in (self.policy, self.alphas)]
        self.policy_opt = torch.optim.Adam(groups, lr=args.policy_lr, **adam)  # the rate of the first group decays
        self.parts = {k: getattr(self, k) for k in ("policy", "qf", "target_qf", "alphas", "policy_opt", "qf_opt")}
        if args.compile:
            plumbing.compile_methods(self, "policy_loss", "critic_loss")

    def critic_loss(self, obs, act, rew, next_obs, terminated, num_real):
        """TD error on d_f and conservative term, each summed over both Q functions (Eq. 2). Real rows come first."""
        N, A, device = self.args.cql_samples, self.act_dim, obs.device
        rho = slice(num_real if self.args.rho_states == "model" and num_real < len(obs) else 0, None)  # rows of rho
        B = len(obs[rho])
        with torch.no_grad():  # no gradient through sampled actions
            mean, log_std = self.policy(next_obs)
            next_act, _ = squash(mean, log_std, torch.randn_like(mean))
            next_q = self.target_qf(next_obs, next_act).amin(0)  # (B,)
            target_q = rew + self.args.gamma * (1 - terminated) * next_q
            # N uniform actions, N from pi(.|s), N from pi(.|s'), all evaluated at s
            now, later = self.policy(obs[rho]), (mean[rho], log_std[rho])
            drawn = [squash(m[:, None], ls[:, None], torch.randn(B, N, A, device=device)) for m, ls in (now, later)]
            acts = torch.cat([2 * torch.rand(B, N, A, device=device) - 1, *(a for a, _ in drawn)], 1)  # (B, 3N, A)
            uniform_log_density = torch.full((B, N), A * math.log(0.5), device=device)
            log_density = torch.cat([uniform_log_density, *(log_prob for _, log_prob in drawn)], 1)  # (B, 3N)
        q = self.qf(obs, act)  # (2, B)
        td_loss = (q - target_q).square().mean(1).sum()
        with torch.autocast(device.type, torch.bfloat16, enabled=self.args.bf16):
            q_sampled = self.qf(obs[rho].unsqueeze(1).expand(-1, 3 * N, -1), acts)  # (2, B, 3N)
        pushed_down = soft_maximum(q_sampled, log_density, self.args.cql_temperature).mean(1).sum()
        pushed_up = q[:, :num_real].mean(1).sum()  # data actions only
        penalty = pushed_down - pushed_up
        metrics = {"losses/conservative": penalty.detach(), "q/data": pushed_up.detach() / 2}
        metrics |= {"q/sampled": q_sampled.detach().mean(), "q/target": target_q.mean()}
        return td_loss + self.args.beta * penalty, metrics

    def policy_loss(self, obs, alpha):
        """COMBO Eq. 3 with the entropy of SAC Eq. 7."""
        mean, log_std = self.policy(obs)
        act, log_prob = squash(mean, log_std, torch.randn_like(mean))
        return (alpha * log_prob - self.qf(obs, act).amin(0)).mean(), log_prob.detach().mean()

    def update(self, obs, act, rew, next_obs, terminated, num_real, step):
        """Q functions, policy with temperature, targets, in this order; returns metrics."""
        alpha = self.alphas["sac"].detach().exp()
        critic_loss, metrics = self.critic_loss(obs, act, rew, next_obs, terminated, num_real)
        descend(self.qf_opt, critic_loss)  # l. 5
        if self.args.policy_lr_decay:
            rate = 0.5 * (1 + math.cos(math.pi * min(1, (step - 1) / self.args.policy_lr_decay)))
            self.policy_opt.param_groups[0]["lr"] = rate * self.args.policy_lr
        policy_loss, log_prob = self.policy_loss(obs, alpha)
        temperature_loss = -self.alphas["sac"] * (log_prob + self.target_entropy)  # SAC Eq. 18, of log alpha
        descend(self.policy_opt, policy_loss + temperature_loss)  # l. 6
        with torch.no_grad():
            torch._foreach_lerp_(list(self.target_qf.parameters()), list(self.qf.parameters()), self.args.tau)
        metrics |= {"losses/critic": critic_loss.detach(), "losses/policy": policy_loss.detach()}
        return metrics | {"q/entropy": -log_prob, "q/alpha": alpha}

    @torch.no_grad()
    def act(self, obs):
        """obs (B, O) -> deterministic actions (B, A), on the CPU"""
        return self.policy(obs.to(self.device))[0].tanh().cpu()


# --- settings and run folder: bookkeeping up to main() ---

# Flags that do not affect training, so a run may be resumed with other values.
BOOKKEEPING = {"run_dir", "checkpoint_every", "log_every", "num_threads", "total_updates", "track", "device", "dataset"}
BOOKKEEPING |= {"wandb_project_name", "wandb_entity", "wandb_group", "dynamics_from"}
# Flags that determine a model, besides data and direction: --dynamics-from needs them to be equal.
MODEL_FLAGS = {"seed", "ensemble_size", "num_elites", "dynamics_hidden", "dynamics_bf16", "dynamics_lr", "holdout_max"}
MODEL_FLAGS |= {"dynamics_batch_size", "dynamics_weight_decay", "dynamics_patience", "holdout_ratio"}


def resolve(args, task):
    """Fills in the settings of preset and task where the user left None; UserError for settings that cannot work."""
    table = SETTINGS[args.preset]
    row = table[max((k for k in table if task.name.startswith(k)), key=len)]
    tuned = dict(zip(("horizon", "beta", "rollout_policy", "rho_states", "model_ratio"), row, strict=True))
    if args.preset == "v2":
        tuned |= {"qf_lr": 3e-4, "policy_lr": 1e-4, "policy_lr_decay": 1_000_000}
    else:
        slow = task.domain == "walker2d"
        tuned |= {"qf_lr": 1e-4 if slow else 3e-4, "policy_lr": 1e-5 if slow else 1e-4, "policy_lr_decay": 0}
    args = plumbing.validate(replace(args, **{k: v for k, v in tuned.items() if getattr(args, k) is None}))
    if 0 < args.policy_lr_decay < args.total_updates:
        raise UserError(f"--policy-lr-decay {args.policy_lr_decay}: from then on the policy's rate is 0; 0: no decay")
    num_real = int((1 - args.model_ratio) * args.batch_size + 1e-6)
    if args.model_ratio > 0 and num_real == args.batch_size:
        raise UserError(f"--model-ratio {args.model_ratio}: leaves no imagined rows in a batch of {args.batch_size}")
    if num_real == 0:
        raise UserError(f"--model-ratio {args.model_ratio}: leaves no real rows in a batch of {args.batch_size}")
    name = "combo_cql" if args.model_ratio == 0 else "combo" if args.beta > 0 else "combo_beta0"
    name += "" if args.preset == "v2" else "_v0"
    return replace(args, exp_name=args.exp_name or name, num_threads=args.num_threads or torch.get_num_threads())


class Run:
    """The run's folder: settings, log, a checkpoint per training phase, result. The same command resumes it."""

    def __init__(self, args, config):
        """Open or create the folder; UserError if it holds another run. `finished`: nothing is left to do."""
        self.args, self.config, self.folder = args, config, Path(args.run_dir) / config["name"]
        self.states, self.finished = plumbing.read_folder(self.folder, config, BOOKKEEPING, args.total_updates)
        if self.finished:
            return print(f"{self.folder} is finished")
        last = max(self.states.values(), key=lambda state: state["worked"], default={"config": config})
        self.evals, self.worked = last.get("evals", []), last.get("worked", 0.0)
        config["wandb_id"] = last["config"]["wandb_id"]  # a resumed run continues its curve
        self.folder.mkdir(parents=True, exist_ok=True)
        self.metrics = plumbing.open_log(self.folder / "metrics.jsonl", last.get("log_bytes", 0), self.evals)
        self.wandb = plumbing.start_wandb(args, config, self.folder) if args.track else None
        print(f"{self.folder}: {'resumed' if self.states else 'new run'}", file=sys.stderr)

    def steps(self, phase, total, every, **parts):
        """Yields the remaining step numbers. `parts` (objects with a state dict) and random states are restored before
        the first step, and saved to <phase>.pt every `every` steps and after the last."""
        path, state, step = self.folder / f"{phase}.pt", self.states.pop(phase, None), 0
        if state is None and (other := getattr(self.args, f"{phase}_from", None)):
            state = plumbing.read_other_run(Path(other), phase, self.config)
        if state:
            step = plumbing.restore(state, parts, total, path)
        plumbing.write_file(self.folder / "config.json", plumbing.to_json(self.config, 1))
        (self.folder / "result.json").unlink(missing_ok=True)
        self.clock, self.begin = plumbing.Clock(), (step, self.worked)
        self.mark = self.begin
        with plumbing.progress(total, phase, "step", step) as self.bar:
            while step != total:
                step += 1
                torch.compiler.cudagraph_mark_step_begin()
                yield step
                self.worked += self.clock.lap()
                self.bar.update()
                if step % every == 0 or step == total:
                    facts = {"step": step, "config": self.config, "evals": self.evals, "worked": self.worked}
                    plumbing.save(path, parts, facts | {"log_bytes": self.metrics.tell()})

    def log(self, update, metrics):
        """Adds a line to metrics.jsonl; only here do tensors become floats. A loss that is not finite ends the run."""
        row = {"update": update} | {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in metrics.items()}
        losses = {k.removeprefix("losses/"): v for k, v in row.items() if k.startswith("losses/")}
        if bad := [k for k, v in losses.items() if not math.isfinite(v)]:
            raise UserError(f"loss not finite at update {update}: {', '.join(bad)}; see {self.folder}", status=3)
        if losses and update:
            self.worked += self.clock.lap()
            row["charts/SPS"] = (update - self.mark[0]) / max(self.worked - self.mark[1], 1e-9)
            self.mark = (update, self.worked)
        self.evals += [row] if "eval/return" in row else []
        self.bar.set_postfix({k: f"{v:.4g}" for k, v in (losses | plumbing.score(self.evals)).items()})
        plumbing.append(self.metrics, row)
        plumbing.to_wandb(self, lambda run: run.log(row))

    def finish(self, **more):
        result = plumbing.summary(self) | more
        plumbing.write_file(self.folder / "result.json", plumbing.to_json(result, 1))
        plumbing.to_wandb(self, lambda run: (run.summary.update(result), run.finish()))
        print(f"{self.folder}: normalized score {result['normalized_score']}, return {result['return_mean']}")


def main(args):
    task = parse_task(args.env)
    args = resolve(args, task)
    device = plumbing.start(args)
    data = load_dataset(task, args.dataset)
    num_real = int((1 - args.model_ratio) * args.batch_size + 1e-6)  # rounded down, as in OfflineRL-Kit
    num_model = args.batch_size - num_real
    terminates = termination_fn(task, data, args) if num_model else None
    envs = [make_env(task) for _ in range(args.eval_episodes)]
    run = Run(args, plumbing.describe_run(__file__, args, task, data, device, "forward", MODEL_FLAGS))
    if run.finished:
        return
    obs_dim, act_dim = data.obs.shape[1], data.act.shape[1]
    rows = pack(data.obs, data.act, data.rew, data.next_obs, data.terminated).to(device)

    if num_model:
        obs, act, rew, next_obs, _ = unpack(rows[data.has_next.to(device)], obs_dim, act_dim)
        torch.manual_seed(4 * args.seed)  # each phase has its own seed; + 2: rollouts, + 3: learner
        dynamics = train_dynamics(obs, act, rew, next_obs, args, run)  # Alg. 1, l. 1
        model_buffer = ModelBuffer(data.obs.to(device), dynamics, terminates, args)

    torch.manual_seed(4 * args.seed + 3)  # the learner starts from the same networks with and without a model
    agent = COMBO(obs_dim, act_dim, args, device)
    parts = agent.parts | ({"model_buffer": model_buffer} if num_model else {})
    for step in run.steps("agent", args.total_updates, args.checkpoint_every, **parts):  # l. 3
        if num_model and (step - 1) % args.rollout_every == 0:
            run.log(step - 1, model_buffer.add(step - 1, agent.policy.state_dict()))  # l. 4
        batch = draw(rows, num_real)
        if num_model:
            batch = torch.cat([batch, draw(model_buffer.rows, num_model)])  # D u D_model
        metrics = agent.update(*unpack(batch, obs_dim, act_dim), num_real, step)  # l. 5, 6
        if step % args.log_every == 0 or step == args.total_updates:
            run.log(step, metrics)
        if args.eval_episodes and (step % args.eval_every == 0 or step == args.total_updates):
            episodes = []
            run.log(step, evaluate(task, envs, agent.act, args.seed, args.gamma, run.folder, episodes))
            if num_model:
                run.log(step, model_error(dynamics, agent.act, episodes, args.horizon))
    run.finish()


if __name__ == "__main__":
    plumbing.run_script(main, Args, __doc__)
