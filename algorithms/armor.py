"""ARMOR: adversarial model for offline RL. The policy learns to beat a reference in the worst model that fits the data.

Paper: Bhardwaj et al. 2023, arXiv:2302.11048. We found no code and know Algorithm 1 and Eq. 4, 5 only from a poster.
The base is ATAC (Cheng et al. 2022, arXiv:2202.02446). Code: microsoft/ATAC, microsoft/lightATAC.

  game       max_pi min_(M in M_alpha) J_M(pi) - J_M(pi_ref)         M_alpha: models that fit the data almost best
  D_M        (s, a, r_M, s'_M), r_M = R_M(s, a), s'_M ~ P_M(.|s, a)  (s, a) of the data and of D_model       l. 3, 4
  adversary  min_(f_i, M) L(f_i) + beta (E^w(f_i, M) + lambda E_D(M)), i = 1, 2; f_i projected               l. 5, Eq. 4
             L   = E_DM[f(s, pi) - f(s, pi_ref)]                                      relative pessimism
             E^w = (1-w) E_DM[(f - r_M - gamma f(s'_M, pi))^2]                        residual error
                   +  w  E_DM[(f - r_M - gamma min_j f_target,j(s'_M, pi))^2]         error against target networks
             E_D = E_data[-log P_M(s'|s, a) + (R_M(s, a) - r)^2 / V_max^2]            data fit
  actor      max_pi L(f_1) at a rate 1000 times slower, with entropy                                         l. 6, Eq. 5
  rollouts   per update a step of pi and of pi_ref in M from every state; (s, a) into D_model; restart every H   l. 7, 8

    python algorithms/armor.py --env hopper-medium-replay
    python algorithms/armor.py --env hopper-medium-replay --reference runs/<run> --exp-name armor_on_<run>  # beat a run
    python algorithms/armor.py --env hopper-medium-replay --model-ratio 0                                   # ATAC

E_x[.] is a mean over x; f alone is f_i(s, a). lambda replaces M_alpha's alpha; alpha in the code is the temperature.
L depends on given states only, so M gets its gradient from E^w and E_D: L makes the critics pessimistic, and M follows
them as far from the data as lambda allows.

What the poster leaves open and what we do ("unverified": the paper's choice according to sources we could not check):
  1. E_D is a mean (printed: a sum) over real transitions with a known successor (printed: over D_model, which holds no
     r or s'). So the paper's lambda would mean something else here.
  2. V_max is the fitted model's reward error on the holdout set, at least 1e-3, so that rewards are tied to the data
     about as closely as states.
  3. M is one member of MOPO's ensemble (arXiv:2005.13239), R_M its mean reward, fitted first, with early stopping
     (unverified: for 100 000 steps). E_D excludes the holdout set of this fit, which shows whether the game harms M.
  4. M and f_i step together; M's learning rate rises from 0 over 500 updates, its weight decay stays, its log-variance
     bounds are fixed. M's gradient also flows through a' ~ pi(.|s'_M), one sample per row, and f_target.
  5. From ATAC's code: for beta > 1 the adversary's loss is divided by beta, for alpha > 1 the actor's by alpha; Proj_F
     bounds each layer's norm by 100; Proj_Pi is a learnt temperature, which steps before pi; w = 1/2, tau, gamma,
     learning rates, layer widths (unverified: as in ARMOR).
  6. lightATAC averages the entropy over action dimensions, so its target entropy is per dimension. Here, as in ATAC, it
     is a sum; the target is minus the number of action dimensions. log std is at least -5 (ATAC: -11.5).
  7. Values of s' in the target are clipped to the returns that the data's rewards allow (ATAC: optional).
  8. Warm start of 100 000 updates (ATAC's script; unverified: ARMOR's): pi clones the data, with the game's entropy
     bonus, and the critics minimise E^w on the data. The clone, frozen, is pi_ref. Then pi's optimizer and the
     temperature are reset; the critics' optimizer and targets are kept.
  9. Given a reference, pi starts as its copy (--clone data: as a clone of the data), and the entropy target is lowered
     to the copy's if need be. Half of each batch in the warm start is then from M; data alone would leave other actions
     overestimated.
 10. H is the episode length (unverified). Rollouts that terminate (no bootstrap) or leave the range of the data by more
     than 10 % restart from the states of the minibatch. Batches are half data, half D_model (its last 1 000 000 pairs).
 11. beta = 16 (ATAC's script; lightATAC: 3) and lambda = 10 000 were chosen on halfcheetah-jump (benchmarks.md); the
     paper's, one pair per dataset, are unknown. With a small lambda M bends to the critics instead of the data.
 12. ATAC (--model-ratio 0): E^w uses the data's r, s', terminals; L its actions, unless --reference is bc or a policy.
"""

import copy
import hashlib
import math
import sys
from dataclasses import dataclass, replace
from functools import partial
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
    exp_name: Name | None = None  # None: armor; atac without model
    seed: Seed = 0
    total_updates: PositiveInt = 1_000_000  # gradient updates of the learner; raise it to continue a finished run
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    num_threads: PositiveInt | None = None  # CPU threads; None: all cores
    compile: bool = False  # torch.compile the losses; on a GPU with CUDA graphs
    bf16: bool = False  # bfloat16 in the hidden layers of policy and Q functions
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
    ensemble_size = num_elites = 1  # no flags: ARMOR has no ensemble

    # --- rollout ---
    horizon: PositiveInt | None = None  # updates after which all rollouts restart (H); None: the episode length
    model_ratio: Share = 0.5  # share of pairs from D_model in a batch, the rest is data; 0: ATAC, no model
    pairs_kept: Annotated[PositiveInt, tyro.conf.arg(aliases=["--model-buffer-size"])] = 1_000_000  # (s, a) in D_model
    imagined_ends: bool = True  # rollouts end by the environment's termination rule; if off, never
    rollout_margin: NonNegative = 0.1  # rollouts restart outside the data's range widened by this share

    # --- learner ---
    reference: str | None = None  # pi_ref: bc (clone; default), data (ATAC's default), a run's folder, a policy's file
    warm_start_updates: NonNegativeInt = 100_000  # gradient updates before the game
    warm_start_from: str | None = None  # warm_start.pt of a run with the same data, seed and warm-start settings
    clone: Literal["data", "copy"] | None = None  # pi starts as a clone of the data or as pi_ref; None: by --reference
    model_ramp: PositiveInt = 500  # updates over which M's rate rises from 0 to --fast-lr
    batch_size: PositiveInt = 256  # real and imagined transitions together
    gamma: Share = 0.99  # discount
    tau: Share = 0.005  # target network update rate
    hidden: tuple[PositiveInt, ...] = (256, 256, 256)  # layer sizes of policy (a copy keeps its own) and Q functions
    fast_lr: Positive = 5e-4  # critics, model, temperature; everything in the warm start (eta_fast)
    slow_lr: Positive = 5e-7  # policy (eta_slow)
    target_entropy: FiniteFloat | None = None  # None: minus the number of action dimensions, or a copy's own if lower
    bellman_weight: Annotated[NonNegative, tyro.conf.arg(aliases=["--beta"])] = 16.0  # of E^w and E_D against L (beta)
    fit_weight: Annotated[NonNegative, tyro.conf.arg(aliases=["--lambda"])] = 10_000.0  # of E_D against E^w (lambda)
    target_weight: Share = 0.5  # weight of the error against target networks in E^w (w); residual error: 1 - w
    v_max: Positive | None = None  # scale of the reward error in E_D (V_max); None: that of the fitted model
    clip_v: bool = True  # clip values of s' to returns that the data's rewards allow
    weight_norm: Positive = 100.0  # maximum Frobenius norm of a critic's layer (Proj_F)


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


def squashed_log_prob(mean, log_std, act):
    """Log-density of given actions under the tanh-squashed Gaussian; |act| is clipped to 1 - 1e-6: (..., A) -> (...)"""
    pre_tanh = act.clamp(-1 + 1e-6, 1 - 1e-6).atanh()
    return squash(mean, log_std, (pre_tanh - mean) * (-log_std).exp())[1]


def sample_action(policy, obs):
    """Sampled actions and their log-densities: (B, O) -> (B, A), (B,)"""
    mean, log_std = policy(obs)
    return squash(mean, log_std, torch.randn_like(mean))


class Policy(nn.Module):
    """pi(a|s): tanh-squashed Gaussian, log standard deviation clamped to [-5, 2]."""

    def __init__(self, obs_dim, act_dim, hidden):
        super().__init__()
        self.net = mlp(obs_dim, *hidden, 2 * act_dim)

    def forward(self, obs):
        """obs (B, O) -> mean and log standard deviation before the tanh, (B, A) each"""
        mean, log_std = self.net(obs).chunk(2, -1)
        return mean, log_std.clamp(-5, 2)


class Reference(nn.Module):
    """pi_ref, frozen. agent: state dicts by name, as these scripts or datasets/mujoco.py's SAC save them."""

    def __init__(self, agent):
        super().__init__()
        weights, self.mean_bound = dict(agent["policy"]), math.inf
        self.least_log_std = -20 if "head.weight" in weights else -5  # SAC of datasets/mujoco.py, or these scripts
        for old, new in (("body.", "net."), ("head.", "net.4.")):
            weights = {k.replace(old, new): w for k, w in weights.items()}
        if "normalizer" in agent:  # sra_*.py: the policy sees standardised states, and its mean is clamped
            mean, std, self.mean_bound = agent["normalizer"]["mean"], agent["normalizer"]["std"], 9
            weights["net.0.weight"] = weights["net.0.weight"] / std
            weights["net.0.bias"] = weights["net.0.bias"] - weights["net.0.weight"] @ mean
        shapes = [w.shape for k, w in weights.items() if k.endswith("weight")]  # (out, in) of every layer
        self.hidden = [n for n, _ in shapes[:-1]]
        self.net = mlp(shapes[0][1], *self.hidden, shapes[-1][0])
        self.load_state_dict(weights)
        self.requires_grad_(False)

    def forward(self, obs):
        """obs (B, O) -> mean and log standard deviation before the tanh, (B, A) each"""
        mean, log_std = self.net(obs).chunk(2, -1)
        return mean.clamp(-self.mean_bound, self.mean_bound), log_std.clamp(self.least_log_std, 2)


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


def gaussian(model, obs, act):
    """Mean and log-variance of (r, s' - s) under the single model, (B, 1+O) each, with gradients."""
    mean, logvar = model(model.inputs(obs, act).unsqueeze(0))
    return mean[0], logvar[0]


def sample_step(obs, mean, logvar):
    """r_M = R_M(s, a) and s'_M ~ P_M(.|s, a), reparameterised (Alg. 1, l. 4): (B, O), 2 (B, 1+O) -> (B,), (B, O)"""
    return mean[:, 0], obs + mean[:, 1:] + (0.5 * logvar[:, 1:]).exp() * torch.randn_like(obs)


def data_fit(mean, logvar, obs, rew, next_obs, fit_rows, v_max):
    """E_D(M), a mean over the rows where `fit_rows` (B,) is 1: -log P_M(s'|s, a) + (R_M(s, a) - r)^2 / V_max^2"""
    error = next_obs - obs - mean[:, 1:]
    nll = 0.5 * (error.square() * (-logvar[:, 1:]).exp() + logvar[:, 1:] + math.log(2 * math.pi)).sum(-1)
    return ((nll + (mean[:, 0] - rew).square() / v_max**2) * fit_rows).sum() / fit_rows.sum().clamp(min=1)


@torch.no_grad()
def model_fit(model, obs, act, rew, next_obs):
    """Errors on held-out rows."""
    mean, logvar = gaussian(model, obs, act)
    squares = (mean - torch.cat([rew[:, None], next_obs - obs], -1)).square()
    fit = {"nll": data_fit(mean, logvar, obs, rew, next_obs, torch.ones_like(rew), math.inf)}
    return fit | {"reward_error": squares[:, 0].mean().sqrt(), "state_error": squares[:, 1:].mean().sqrt()}


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


class Rollouts:
    """D_model, and the current states of the rollouts of pi and pi_ref (Alg. 1, l. 7, 8); obs (N, O): data states."""

    def __init__(self, obs, act_dim, terminates, args):
        self.args, self.terminates = args, terminates
        self.pairs = obs.new_zeros(args.pairs_kept, obs.shape[1] + act_dim)  # (s, a)
        low, high = obs.aminmax(dim=0)
        margin = args.rollout_margin * torch.where(high > low, high - low, math.inf)  # no bounds for constant columns
        self.low, self.high = low - margin, high + margin
        self.added, self.widths = 0, [obs.shape[1], act_dim]  # D_model is empty (l. 1)

    def sample(self, size):
        """(s, a) of D_model: (size, O), (size, A); no rows while it is empty"""
        rows = self.pairs[: self.added]
        if len(rows):
            rows = rows[torch.randint(len(rows), (size,), device=rows.device)]
        return rows.split(self.widths, -1)

    @torch.no_grad()
    def transitions(self, size, model):
        """(s, a) of D_model and their transitions in M (Alg. 1, l. 4), for the warm start."""
        obs, act = self.sample(size)
        rew, next_obs = sample_step(obs, *gaussian(model, obs, act))
        return obs, act, rew, next_obs, self.terminates(obs, act, next_obs).float()

    @torch.no_grad()
    def advance(self, step, starts, policy, reference, model):
        """One step of every rollout in M; starts (B, O): states of this update's real rows. Returns the shares of
        rollouts that end or leave the data."""
        starts = starts.repeat(2, 1)
        if (step - 1) % self.args.horizon == 0:
            self.states = starts  # l. 7
        pi_obs, ref_obs = self.states.chunk(2)
        act = torch.cat([sample_action(policy, pi_obs)[0], sample_action(reference, ref_obs)[0]])
        slots = (self.added + torch.arange(len(act), device=act.device)) % len(self.pairs)  # replaces the oldest pairs
        self.pairs[slots] = torch.cat([self.states, act], -1)  # l. 8
        self.added += len(act)
        _, next_obs = sample_step(self.states, *gaussian(model, self.states, act))
        ended = self.terminates(self.states, act, next_obs) | ~next_obs.isfinite().all(-1)
        left = ((next_obs < self.low) | (next_obs > self.high)).any(-1) & ~ended
        self.states = torch.where((ended | left)[:, None], starts, next_obs)
        return {"model/rollout_ended": ended.float().mean(), "model/rollout_left": left.float().mean()}

    def state_dict(self):
        filled = self.pairs[: self.added].clone()  # of a view, torch.save would write the whole storage
        return {"states": self.states, "pairs": filled, "added": self.added}

    def load_state_dict(self, state):
        self.states, self.added = state["states"].to(self.pairs.device), state["added"]
        self.pairs[: len(state["pairs"])] = state["pairs"]


# --- learner ---


@torch.no_grad()
def entropy(policy, obs):
    """Mean entropy of the policy in states (N, O), from one sample each, with fixed noise."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return -sample_action(policy, obs)[1].mean().item()


def value_range(rew, gamma):
    """Lowest and highest return that rewards between 0 and the extremes of `rew` (N,) allow, at least 1 / (1 - gamma)
    apart (lightATAC)."""
    horizon = 1 / max(1 - gamma, 1e-8)
    high = max(0.0, rew.max().item() * horizon)
    return min(0.0, rew.min().item() * horizon, high - horizon), high


def normalized_sum(loss, regulariser, weight):
    """(loss + weight * regulariser) / max(1, weight): the same optimum, bounded gradients."""
    return loss / weight.clamp(min=1) + weight.clamp(max=1) * regulariser


class ARMOR:
    """The two players of the game; without a model: ATAC."""

    def __init__(self, obs_dim, act_dim, args, device, return_range, hidden=None):
        """return_range: (lowest, highest); hidden: layers of the policy; None: as the critics"""
        self.args, self.device, self.return_range = args, device, return_range
        self.reference = self.model = None  # set by begin_game
        self.policy = Policy(obs_dim, act_dim, hidden or args.hidden).to(device)
        self.qf = QFunctions(obs_dim, act_dim, args.hidden).to(device)
        self.target_qf = QFunctions(obs_dim, act_dim, args.hidden).to(device).requires_grad_(False)
        self.target_qf.load_state_dict(self.qf.state_dict())
        self.log_alpha = nn.ParameterDict({"sac": torch.zeros(())}).to(device)  # temperature
        self.target_entropy = -float(act_dim) if args.target_entropy is None else args.target_entropy
        self.beta = torch.tensor(args.bellman_weight, device=device)
        self.projected = [p for k, p in self.qf.named_parameters() if k.endswith("weight")]
        self.adam = partial(torch.optim.Adam, fused=True, capturable=device.type == "cuda")
        self.autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=args.bf16)
        self.adversary_opt = self.adam(self.qf.parameters(), lr=args.fast_lr)
        self.policy_opt = self.adam(self.policy.parameters(), lr=args.fast_lr)
        self.alpha_opt = self.adam(self.log_alpha.parameters(), lr=args.fast_lr)
        if args.compile:
            torch._dynamo.config.automatic_dynamic_shapes = False  # the first batch, without D_model, is smaller
            plumbing.compile_methods(self, "bellman", "adversary_loss", "policy_loss")

    @property
    def parts(self):
        names = ("policy", "qf", "target_qf", "log_alpha", "policy_opt", "alpha_opt", "adversary_opt")
        return {k: getattr(self, k) for k in names} | ({"model": self.model} if self.model else {})

    def begin_game(self, reference, model=None, terminates=None, v_max=1.0):
        """After the warm start: slow policy, new temperature, and M joins the critics' optimizer, which is kept.
        reference None: the data's actions; model None: ATAC."""
        self.reference, self.model, self.terminates, self.v_max = reference, model, terminates, v_max
        nn.init.zeros_(self.log_alpha["sac"])
        self.policy_opt = self.adam(self.policy.parameters(), lr=self.args.slow_lr)
        self.alpha_opt = self.adam(self.log_alpha.parameters(), lr=self.args.fast_lr)
        if model is not None and self.args.bellman_weight:
            # The fit's loss was 2 NLL / n, with n outputs. In the game f_1 and f_2 each add lambda min(1, beta) NLL,
            # together n lambda min(1, beta) times as much; the decay is raised by the same factor.
            scale = len(model.max_logvar) * self.args.fit_weight * min(1, self.args.bellman_weight)
            for w, decay in zip(model.weight, self.args.dynamics_weight_decay, strict=True):
                self.adversary_opt.add_param_group({"params": [w], "weight_decay": scale * decay})
            self.adversary_opt.add_param_group({"params": [*model.bias]})  # the log-variance bounds stay fixed

    def ramp_model(self, step):
        """Raises M's rate from 0: its Adam state is new, so the first steps would have full length."""
        for group in self.adversary_opt.param_groups[1:]:
            group["lr"] = self.args.fast_lr * min(1, step / self.args.model_ramp)

    def bellman(self, obs, act, rew, next_obs, terminated, others=()):
        """E^w of both critics, (2,), and their values of the rows' actions and of `others` in obs, (2, B) each."""
        with self.autocast():  # not under no_grad: M learns through s'_M, a' and f_target
            next_act, _ = sample_action(self.policy, next_obs)
            states = torch.cat([obs, next_obs, *[obs] * len(others)])
            q, next_q, *q_others = self.qf(states, torch.cat([act, next_act, *others])).split(len(obs), 1)
            next_target = self.target_qf(next_obs, next_act).amin(0)
        if self.args.clip_v:
            next_target = next_target.clamp(*self.return_range)
        w, discount = self.args.target_weight, self.args.gamma * (1 - terminated)
        residual = (q - (rew + discount * next_q)).square().mean(1)
        error = (1 - w) * residual + w * (q - (rew + discount * next_target)).square().mean(1)
        return error, q, *q_others

    def adversary_loss(self, obs, act, pi_act, ref_act, rew, next_obs, terminated, fit_rows):
        """l^adversary, summed over f_1 and f_2 (Eq. 4). obs, act: the pairs of D_M, those of the data first, with their
        rew, next_obs, terminated and fit_rows (successor known, not held out); ref_act None: the data's actions."""
        n, fit, metrics = len(rew), 0.0, {}
        if self.model is not None:
            mean, logvar = gaussian(self.model, obs, act)
            fit = data_fit(mean[:n], logvar[:n], obs[:n], rew, next_obs, fit_rows, self.v_max)  # E_D
            rew, next_obs = sample_step(obs, mean, logvar)  # D_M, l. 4
            terminated = self.terminates(obs, act, next_obs).float()
            metrics = {"losses/data_fit": fit.detach()}
        others = [pi_act] if ref_act is None else [pi_act, ref_act]
        bellman, q, q_pi, *q_ref = self.bellman(obs, act, rew, next_obs, terminated, others)
        q_ref = q_ref[0] if q_ref else q
        relative = (q_pi - q_ref).mean(1)  # L, (2,)
        loss = normalized_sum(relative, bellman + self.args.fit_weight * fit, self.beta).sum()
        metrics |= {"losses/adversary": loss, "losses/bellman": bellman.mean(), "losses/relative": relative[0]}
        metrics |= {"q/data": q[:, :n].mean(), "q/policy": q_pi.mean(), "q/reference": q_ref.mean()}
        return loss, {k: v.detach() for k, v in metrics.items()}

    def policy_loss(self, obs, act, log_prob, alpha):
        """l^actor with entropy bonus (Eq. 5), without f_1(s, pi_ref), which does not depend on the policy."""
        with self.autocast():
            q = self.qf.q1(torch.cat([obs, act], -1))
        return normalized_sum(-q.mean(), log_prob.mean(), alpha)

    def step_critics(self, loss):
        """Updates critics and M, applies Proj_F, updates targets (l. 5); returns the largest norm before Proj_F."""
        descend(self.adversary_opt, loss)
        with torch.no_grad():
            norms = torch._foreach_norm(self.projected)
            factors = torch._foreach_mul(torch._foreach_reciprocal(norms), self.args.weight_norm)
            torch._foreach_mul_(self.projected, torch._foreach_clamp_max(factors, 1.0))
            torch._foreach_lerp_(list(self.target_qf.parameters()), list(self.qf.parameters()), self.args.tau)
        return torch.stack(norms).amax()

    def step_alpha(self, log_prob):
        """Updates the temperature (Proj_Pi of l. 6), which rises while the entropy is below its target; returns it."""
        descend(self.alpha_opt, -self.log_alpha["sac"] * (log_prob.detach().mean() + self.target_entropy))
        return self.log_alpha["sac"].detach().exp()

    def warm_start_update(self, obs, act, rew, next_obs, terminated, cloned):
        """Warm start: critics by E^w, policy by the likelihood of `cloned` (B, A), with entropy; kept if None."""
        bellman, q = self.bellman(obs, act, rew, next_obs, terminated)
        self.step_critics(bellman.sum())
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

    def update(self, obs, act, rew, next_obs, terminated, fit_rows=None, pairs=None):
        """Adversary, targets, temperature, policy, in this order (Alg. 1, l. 4-6); pairs: (s, a) of D_model."""
        if pairs is not None:
            obs, act = torch.cat([obs, pairs[0]]), torch.cat([act, pairs[1]])
        with self.autocast():
            pi_act, log_prob = sample_action(self.policy, obs)
            ref_act = None if self.reference is None else sample_action(self.reference, obs)[0]
        loss, metrics = self.adversary_loss(obs, act, pi_act.detach(), ref_act, rew, next_obs, terminated, fit_rows)
        norm = self.step_critics(loss)  # l. 5
        alpha = self.step_alpha(log_prob)
        policy_loss = self.policy_loss(obs, pi_act, log_prob, alpha)
        descend(self.policy_opt, policy_loss)  # l. 6
        metrics |= {"losses/policy": policy_loss.detach(), "q/entropy": -log_prob.detach().mean(), "q/alpha": alpha}
        return metrics | {"q/weight_norm": norm}

    @torch.no_grad()
    def act(self, obs, policy=None):
        """obs (B, O) -> deterministic actions (B, A), on the CPU; policy None: its own"""
        return (policy or self.policy)(obs.to(self.device))[0].tanh().cpu()


def warm_start(agent, rows, reference, dynamics, rollouts, args, run):
    """Trains the critics on the data and, with rollouts, in M, and the policy as a clone, unless it is a copy."""
    obs_dim, act_dim = agent.policy.net[0].in_features, agent.policy.net[-1].out_features // 2
    num_model = round(args.model_ratio * args.batch_size) if rollouts else 0
    parts = agent.parts | ({"rollouts": rollouts} if rollouts else {})
    for step in run.steps("warm_start", args.warm_start_updates, args.checkpoint_every, **parts):
        idx = torch.randint(len(rows), (args.batch_size - num_model,), device=rows.device)
        batch = unpack(rows[idx], obs_dim, act_dim)
        if rollouts:
            starts, imagined = batch[0], rollouts.transitions(num_model, dynamics)
            batch = [torch.cat(x) for x in zip(batch, imagined, strict=True)]
            rollouts.advance(step, starts, agent.policy, reference, dynamics)
        metrics = agent.warm_start_update(*batch, batch[1] if args.clone == "data" else None)
        if step % args.log_every == 0:
            run.log(0, {"model/warm_start_update": step} | metrics)


# --- settings and run folder: bookkeeping up to main() ---

# Flags that do not affect training, so a run may be resumed with other values.
BOOKKEEPING = {"run_dir", "checkpoint_every", "log_every", "num_threads", "total_updates", "track", "device", "dataset"}
BOOKKEEPING |= {"wandb_project_name", "wandb_entity", "wandb_group", "dynamics_from", "warm_start_from"}
# Flags that determine a model, besides data and direction: --dynamics-from needs them to be equal.
MODEL_FLAGS = {"seed", "dynamics_hidden", "dynamics_bf16", "dynamics_lr", "holdout_max"}
MODEL_FLAGS |= {"dynamics_batch_size", "dynamics_weight_decay", "dynamics_patience", "holdout_ratio"}
# Likewise for --warm-start-from; IMAGINED: only if the warm start has rollouts.
WARM_START = {"seed", "bf16", "clone", "batch_size", "hidden", "gamma", "tau", "fast_lr", "target_entropy"}
WARM_START |= {"target_weight", "clip_v", "weight_norm"}
IMAGINED = {"dynamics_max_epochs", "model_ratio", "pairs_kept", "rollout_margin", "horizon", "imagined_ends"}


def resolve(args, task):
    """Fills in the task's settings where the user left None; UserError for settings that cannot work."""
    reference = args.reference or ("bc" if args.model_ratio > 0 else "data")
    clone = args.clone or ("data" if reference in ("bc", "data") else "copy")
    args = replace(args, horizon=args.horizon or task.max_steps, reference=reference, clone=clone)
    args = plumbing.validate(args)
    num_model = round(args.model_ratio * args.batch_size)
    num_real = args.batch_size - num_model
    if args.model_ratio > 0 and not (num_model and num_real):
        raise UserError(f"--model-ratio {args.model_ratio}: a batch of {args.batch_size} needs real and imagined rows")
    if num_model and args.pairs_kept < 2 * num_real:
        raise UserError(f"--pairs-kept {args.pairs_kept}: one update adds {2 * num_real} pairs")
    if num_model and args.reference == "data":
        raise UserError("--reference data: imagined states have no data actions; use bc or --model-ratio 0")
    if args.clone != "data" and args.reference in ("bc", "data"):
        raise UserError(f"--clone {args.clone}: --reference {args.reference} gives no policy to copy")
    if not args.warm_start_updates and args.clone != "copy":
        raise UserError("--warm-start-updates 0: there would be no clone; give a --reference policy, not --clone data")
    name = "armor" if num_model else "atac"
    return replace(args, exp_name=args.exp_name or name, num_threads=args.num_threads or torch.get_num_threads())


def given_reference(args, data, domain=""):
    """The policy in --reference; if its domain is known, it must be this `domain`."""
    flag, path = f"--reference {args.reference}:", Path(args.reference)
    if path.is_dir():  # of a finished run, or of datasets/mujoco.py
        path /= "agent.pt" if (path / "result.json").exists() else "checkpoint.pt"
    if not path.is_file():
        raise UserError(f"{flag} no policy there; give bc, data, a finished run's folder or a policy's file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # SAC's holds a replay buffer
        reference = Reference(state.get("agent", state))  # datasets/mujoco.py's agent is one of several parts
    except Exception as e:  # a damaged file can raise anything
        raise UserError(f"{flag} holds no Gaussian policy ({type(e).__name__}: {str(e)[:80]})") from None
    have = (reference.net[0].in_features, reference.net[-1].out_features // 2)
    want = (data.obs.shape[1], data.act.shape[1])
    if have != want:
        raise UserError(f"{flag} state and action dimensions are {have}, the data's {want}; is it for another task?")
    config, name = path.parent / "config.json", path.parent.name.removeprefix("sac-")  # sac-<env>-: datasets/mujoco.py
    theirs = (plumbing.read_json(config).get("task", name) if config.exists() else name).split("-")[0]
    if domain and theirs != domain and theirs in ("halfcheetah", "hopper", "walker2d", "ant", "maze2d", "antmaze"):
        raise UserError(f"{flag} is a policy for {theirs}, not for {domain}")
    weights = b"".join(w.contiguous().numpy().tobytes() for w in reference.state_dict().values())
    data.more_facts["reference"] = hashlib.sha256(weights).hexdigest()  # a run is not resumed with another one
    return reference


def describe(args, task, data, device, imagines):
    """The run's config.json, with what decides its model and its warm start."""
    config = plumbing.describe_run(__file__, args, task, data, device, "forward", MODEL_FLAGS)
    decides, sha256 = config["decides"], data.more_facts.get("reference")
    decides["dynamics"] |= {"ensemble_size": 1, "num_elites": 1}
    decides["warm_start"] = {"data": data.sha256, "cloned": None if args.clone == "data" else sha256}
    decides["warm_start"] |= {"imagines": imagines} | (decides["dynamics"] if imagines else {})
    decides["warm_start"] |= {k: config["args"][k] for k in sorted(WARM_START | (IMAGINED if imagines else set()))}
    config["args"]["reference"] = sha256 or args.reference  # its weights matter, not its path
    return config


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
    num_model = round(args.model_ratio * args.batch_size)
    num_real = args.batch_size - num_model
    imagines = num_model > 0 and args.clone != "data"  # in the warm start
    reference = None if args.reference in ("bc", "data") else given_reference(args, data, task.domain).to(device)
    terminates = termination_fn(task, data, args) if num_model else None
    envs = [make_env(task) for _ in range(args.eval_episodes)]
    run = Run(args, describe(args, task, data, device, imagines))
    if run.finished:
        return
    obs_dim, act_dim = data.obs.shape[1], data.act.shape[1]
    rows = pack(data.obs, data.act, data.rew, data.next_obs, data.terminated).to(device)
    fit_rows, dynamics, game = data.has_next.to(device, copy=True), None, {}

    if num_model:
        obs, act, rew, next_obs, _ = unpack(rows[fit_rows], obs_dim, act_dim)
        torch.manual_seed(4 * args.seed)
        dynamics = train_dynamics(obs, act, rew, next_obs, args, run)
        order = torch.randperm(len(act), generator=torch.Generator().manual_seed(args.seed)).to(device)
        held_out = order[: max(1, min(int(args.holdout_ratio * len(act)), args.holdout_max))]  # as in train_dynamics
        fit_rows[fit_rows.nonzero().squeeze(1)[held_out]] = False  # not in E_D either: model_fit measures M on them
        holdout = [x[held_out] for x in (obs, act, rew, next_obs)]
        fitted = model_fit(dynamics, *holdout)
        v_max = fitted["reward_error"].clamp(min=1e-3) if args.v_max is None else args.v_max
        game = {"model": dynamics, "terminates": terminates, "v_max": v_max}
    new_rollouts = partial(Rollouts, data.obs.to(device), act_dim, terminates, args)

    torch.manual_seed(4 * args.seed + 1)  # with and without a model, so that a clone's warm start is the same
    hidden = reference.hidden if args.clone == "copy" else None
    agent = ARMOR(obs_dim, act_dim, args, device, value_range(data.rew, args.gamma), hidden)
    if args.clone == "copy":
        agent.policy.load_state_dict(reference.state_dict())
        if args.target_entropy is None:  # so that Proj_Pi allows pi_ref
            copied = entropy(agent.policy, data.obs[:: max(1, len(data) // 20_000)].to(device))
            agent.target_entropy = min(agent.target_entropy, copied)
    warm_start(agent, rows, reference, dynamics, new_rollouts() if imagines else None, args, run)
    reference = reference or Reference({"policy": agent.policy.state_dict()}).to(device)  # the clone, frozen
    agent.begin_game(None if args.reference == "data" else reference, **game)
    if args.eval_episodes:  # J(pi_ref), on the evaluation episodes
        ref_eval = evaluate(task, envs, partial(agent.act, policy=reference), args.seed, args.gamma)
        ref_eval = {k.replace("eval/", "reference/"): v for k, v in ref_eval.items()}

    torch.manual_seed(4 * args.seed + 3)
    rollouts = new_rollouts() if num_model else None
    parts = agent.parts | ({"rollouts": rollouts} if num_model else {})
    some_obs = data.obs[:: max(1, len(data) // 2_000)].to(device)
    for step in run.steps("agent", args.total_updates, args.checkpoint_every, **parts):  # l. 2
        idx = torch.randint(len(rows), (num_real,), device=device)
        batch = unpack(rows[idx], obs_dim, act_dim)  # l. 3, D_real's part; rollouts.sample draws D_model's
        if num_model:
            agent.ramp_model(step)
            metrics = agent.update(*batch, fit_rows[idx], rollouts.sample(num_model))  # l. 4-6
            metrics |= rollouts.advance(step, batch[0], agent.policy, reference, agent.model)  # l. 7, 8
        else:
            metrics = agent.update(*batch)
        if step % args.log_every == 0 or step == args.total_updates:
            metrics["q/policy_shift"] = (agent.act(some_obs) - agent.act(some_obs, reference)).abs().mean()
            metrics["q/target_entropy"] = agent.target_entropy
            if num_model:
                fit = model_fit(agent.model, *holdout) | {f"{k}_fitted": v for k, v in fitted.items()}
                metrics |= {f"model/{k}": v for k, v in fit.items()}
            run.log(step, metrics)
        if args.eval_episodes and (step % args.eval_every == 0 or step == args.total_updates):
            metrics = evaluate(task, envs, agent.act, args.seed, args.gamma, run.folder) | ref_eval
            for gain, name in (("improvement", "return"), ("discounted_improvement", "discounted_return")):
                metrics[f"reference/{gain}"] = metrics[f"eval/{name}"] - metrics[f"reference/{name}"]
            run.log(step, metrics)
    last = run.evals[-1] if run.evals else {}
    gains = {k: last.get(f"reference/{k}") for k in ("improvement", "discounted_improvement")}
    run.finish(reference_return=last.get("reference/return"), **gains)


if __name__ == "__main__":
    plumbing.run_script(main, Args, __doc__)
