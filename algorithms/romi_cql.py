"""ROMI-CQL: reverse model-based imagination before policy learning, CQL as the learner.

Papers: Wang et al. 2021, arXiv:2110.00188 (ROMI); Kumar et al. 2020, arXiv:2006.04779 (CQL). Code: wenzhe-li/romi.

  reverse model    p(s, r | s', a): ensemble of Gaussians         maximum likelihood on the data       ROMI Eq. 2
  reverse policy   G(a | s'): conditional VAE                     variational bound on the data        ROMI Eq. 3
                   or pi(a | s'): behaviour cloning (RBC)         maximum likelihood on the data       ROMI Eq. 4
                   or uniform on [-1, 1]^A
  imagination      a ~ G(.|s'), (s, r) ~ p(.|s', a), then s' <- s, h times, from states of the data    ROMI Alg. 1
  learner          CQL(H) on batches with a share eta of imagined transitions                          ROMI Alg. 1
                   alpha_cql (E_s[log sum_a exp Q(s,a)] - E_(s,a)[Q(s,a)]) + 1/2 E[(Q - B Q_target)^2]  CQL Eq. 4

    python algorithms/romi_cql.py --env hopper-medium-replay
    python algorithms/romi_cql.py --env hopper-medium-replay --model-ratio 0                      # CQL, rows by return
    python algorithms/romi_cql.py --env hopper-medium-replay --model-ratio 0 --bc-warmup 1000000  # cloning, same rows

Where paper and code disagree, we follow the code: the KL term has a quarter of its weight in Eq. 3, sampled latents are
clipped to +-0.5, every batch has the same share of imagined transitions, a rollout ends with the first transition whose
s' is terminal, rollouts start from the data's s, not s', and starts and real transitions are sampled in proportion to
their trajectory's return minus the lowest (not on maze2d, see SETTINGS). On antmaze only trajectories that reach the
goal are left. "l." is a line of ROMI's Algorithm 1. Differences from the code:
  1. Batches are split exactly: round(eta B) imagined, the rest real; the code loses one. It makes 1 500 000 updates.
  2. Sampling by return is exact and with replacement, not from a sum tree; uniform if all weights are 0.
  3. Transitions at time limits are used if their successor was recorded; the code drops them. Terminal transitions
     train the models; in the code only on antmaze.
  4. RBC minimises Eq. 4; the code adds half an entropy bonus, takes the std for the variance and counts unused buffer
     rows in the inputs' mean and std. tanh's correction is exact, without + 1e-6; means are not clamped to +-9.
  5. The temperature steps with the policy, not before it. No gradient flows through sampled actions in the penalty.
  6. --lagrange starts at --cql-alpha and keeps the unweighted penalty at the gap; the code starts at 1 and weights it.
  7. Elites are chosen on the holdout set of training; the code draws a new one. An antmaze's goal is estimated from
     rewarded positions; the code asks the environment. Hopper rollouts also end below -100. PyTorch's initialisation.
"""

import copy
import math
import sys
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
from utils import check_ends, describe_imagination, evaluate, load_dataset, make_env, pack, parse_task, unpack


@dataclass
class Args:
    # --- experiment ---
    env: Annotated[str, tyro.conf.arg(aliases=["--env-id"])] = "hopper-medium-replay"  # D4RL task or Minari id
    exp_name: Name | None = None  # None: romi_cql; cql without model; bc if also the warm-up never ends
    seed: Seed = 0
    total_updates: PositiveInt = 1_000_000  # gradient updates of the learner; raise it to continue a finished run
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
    rollout_policy: Literal["cvae", "uniform", "rbc"] | None = None  # source of imagined actions; None: by task
    priority_rollout: bool | None = None  # sample start states by trajectory return; None: by task
    priority_policy: bool | None = None  # sample real transitions by trajectory return; None: by task
    imagined_ends: bool = True  # rollouts end by the environment's termination rule; if off, never
    model_buffer_size: PositiveInt = 4_000_000  # imagined transitions, generated once before policy learning
    rollout_batch_size: PositiveInt = 20_000  # start states per model call
    rollout_policy_updates: PositiveInt = 500_000  # gradient updates of a learnt rollout policy
    rollout_policy_batch_size: PositiveInt = 100
    rollout_policy_lr: Positive = 1e-3
    vae_hidden: PositiveInt = 750  # width of the 2 hidden layers of encoder and decoder
    kl_weight: NonNegative = 0.5  # weight of the mean KL in the rollout policy's CVAE; ROMI Eq. 3 would be 2
    latent_clip: Annotated[float, Field(gt=0)] = 0.5  # bound on the rollout CVAE's sampled latents; paper: inf
    rbc_hidden: PositiveInt = 256  # width of the 2 hidden layers
    rbc_entropy: NonNegative = 0.0  # weight of an entropy bonus; code: 0.5

    # --- learner ---
    batch_size: PositiveInt = 256  # real and imagined transitions together
    gamma: Share = 0.99  # discount
    tau: Share = 0.005  # target network update rate
    hidden: tuple[PositiveInt, ...] = (256, 256, 256)  # hidden layer sizes of policy and Q functions
    qf_lr: Positive = 3e-4
    policy_lr: Positive = 1e-4  # policy and temperature
    target_entropy: FiniteFloat | None = None  # None: minus the number of action dimensions
    bc_warmup: NonNegativeInt = 40_000  # updates in which the policy clones the batch while Q already trains
    cql_alpha: NonNegative = 5.0  # weight of the conservative penalty; with --lagrange its initial value
    cql_samples: PositiveInt = 10  # actions per source (N): uniform, pi(.|s), pi(.|s')
    cql_temperature: Positive = 1.0
    lagrange: bool = False  # learn the weight that keeps the penalty near --lagrange-gap
    lagrange_gap: FiniteFloat = 10.0


# h, eta, rollout policy, sampling by return: wenzhe-li/romi, train_bcq.py, cql_mujoco_new.py; "ours": in neither.
# The longest key that is a prefix of the task's name applies.
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


class ConditionalVAE(nn.Module):
    """G(a|c) with encoder E(c, a) and decoder D(c, z); the condition c is a state, s' for a reverse policy."""

    def __init__(self, obs_dim, act_dim, hidden, kl_weight=0.5, latent_clip=0.5):
        super().__init__()
        self.latent_dim, self.kl_weight, self.latent_clip = 2 * act_dim, kl_weight, latent_clip
        self.encoder = mlp(obs_dim + act_dim, hidden, hidden, 2 * self.latent_dim)
        self.decoder = mlp(obs_dim + self.latent_dim, hidden, hidden, act_dim)

    def decode(self, cond, latent):
        return self.decoder(torch.cat([cond, latent], -1)).tanh()

    def loss(self, cond, act):
        """Reconstruction error and KL to N(0, I), each a mean over batch and dimensions (ROMI Eq. 3)."""
        mean, log_std = self.encoder(torch.cat([cond, act], -1)).chunk(2, -1)
        log_std = log_std.clamp(-4, 15)
        recon = self.decode(cond, mean + log_std.exp() * torch.randn_like(mean))
        kl = -0.5 * (1 + 2 * log_std - mean.square() - (2 * log_std).exp()).mean()
        return F.mse_loss(recon, act) + self.kl_weight * kl

    def sample(self, cond):
        """cond (B, O) -> (B, A)"""
        latent = torch.randn(len(cond), self.latent_dim, device=cond.device)
        return self.decode(cond, latent.clamp(-self.latent_clip, self.latent_clip))


class BehaviourCloning(nn.Module):
    """pi(a|c): tanh-squashed Gaussian on standardised states; conditioned on s' it is RBC (ROMI Sec. 4.4)."""

    def __init__(self, cond, act_dim, hidden, entropy_weight):
        """cond (N, O): states whose mean and standard deviation standardise the input"""
        super().__init__()
        self.entropy_weight, self.net = entropy_weight, mlp(cond.shape[1], hidden, hidden, 2 * act_dim)
        mean, std = cond.mean(0), cond.std(0)
        self.register_buffer("mean", mean)
        std = torch.where(std < 1e-6 * (1 + mean.abs()), 1.0, std + 1e-6)  # 1 for constant columns
        self.register_buffer("std", std)

    def forward(self, cond):
        mean, log_std = self.net((cond - self.mean) / self.std).chunk(2, -1)
        return mean, log_std.clamp(-20, 2)

    def loss(self, cond, act):
        """Negative log-likelihood (ROMI Eq. 4), minus an optional entropy bonus."""
        mean, log_std = self(cond)
        return -squashed_log_prob(mean, log_std, act).mean() - self.entropy_weight * log_std.sum(-1).mean()

    def sample(self, cond):
        mean, log_std = self(cond)
        return squash(mean, log_std, torch.randn_like(mean))[0]


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


# --- rollout ---


def train_rollout_policy(cond, act, args, run):
    """Uniform, or a CVAE or RBC trained on the data (ROMI Alg. 1, l. 6-9). Returns cond (B, O) -> act (B, A)."""
    obs_dim, act_dim = cond.shape[1], act.shape[1]
    if args.rollout_policy == "uniform":  # "an extremely diverse policy in easy tasks" (ROMI Sec. 3)
        return lambda cond: 2 * torch.rand(len(cond), act_dim, device=cond.device) - 1
    if args.rollout_policy == "cvae":
        policy = ConditionalVAE(obs_dim, act_dim, args.vae_hidden, args.kl_weight, args.latent_clip)
    else:
        policy = BehaviourCloning(cond, act_dim, args.rbc_hidden, args.rbc_entropy)
    policy = policy.to(cond.device)
    opt = torch.optim.Adam(policy.parameters(), lr=args.rollout_policy_lr, fused=True)
    loss_fn = torch.compile(policy.loss) if args.compile else policy.loss
    total, every = args.rollout_policy_updates, args.checkpoint_every
    for step in run.steps("rollout_policy", total, every, rollout_policy=policy, opt=opt):
        idx = torch.randint(len(act), (args.rollout_policy_batch_size,), device=act.device)
        loss = loss_fn(cond[idx], act[idx])
        descend(opt, loss)
        if step % args.log_every == 0:
            run.log(0, {"model/rollout_policy_update": step, "losses/rollout_policy": loss})
    return policy.sample


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


def row_sampler(rows, returns=None):
    """Returns a function: size -> that many of `rows` (N, ...), sampled with replacement, uniformly or in proportion to
    their trajectory's return, `returns` (N,), minus the lowest (wenzhe-li/romi, dataset_processor.py)."""
    device, n = rows.device, len(rows)
    if returns is None or returns.max() == returns.min():
        return lambda size: rows[torch.randint(n, (size,), device=device)]
    cdf = (returns - returns.min()).cumsum(0).to(device, torch.float32 if device.type == "mps" else torch.float64)

    def sample(size):
        u = torch.rand(size, dtype=cdf.dtype, device=device) * cdf[-1]
        return rows[torch.searchsorted(cdf, u, right=True).clamp_(max=n - 1)]  # right: never a row of weight 0

    return sample


@torch.no_grad()
def imagine(starts, dynamics, rollout_policy, terminates, args):
    """Reverse rollouts until the buffer is full (ROMI Alg. 1, l. 10-14); starts: size -> data states (size, O).
    Returns rows (M, 2 O + A + 2) and up to 500 chains for inspection: h lists [obs, act, next_obs] in rollout order."""
    M = args.model_buffer_size
    num_starts = min(args.rollout_batch_size, math.ceil(M / args.horizon))  # a small buffer gets whole chains, too
    buffer, filled, chains, bar = None, 0, [], plumbing.progress(M, "imagination", "row")
    while filled < M:  # l. 11
        cond = starts(num_starts)  # target states s', l. 12
        for _ in range(args.horizon):  # the h steps of l. 13
            act = rollout_policy(cond)  # a ~ G(.|s'), l. 13
            pred, rew = dynamics.sample(cond, act)  # s, r ~ p(.|s', a), l. 13
            obs, next_obs = pred, cond
            terminated = terminates(obs, act, next_obs)  # next_obs is the given state
            rows = pack(obs, act, rew, next_obs, terminated)[: M - filled]
            buffer = rows.new_empty(M, rows.shape[1]) if buffer is None else buffer
            buffer[filled : filled + len(rows)] = rows  # l. 14
            filled += len(rows)
            if len(chains) < args.horizon:  # the first batch; a chain that ends is dropped from earlier steps, too
                n = len(chains[0][0]) if chains else min(500, len(rows))
                chains = [[x[:n][~terminated[:n]] for x in step] for step in (*chains, (obs, act, next_obs))]
            cond = pred[~terminated]  # one step back in time; chains whose s' was terminal stop
        bar.update(filled - bar.n)
    bar.close()
    return buffer, chains


# --- learner ---


def conservative_penalty(q_data, q_sampled, log_density, temperature=1.0):
    """CQL(H): log sum_a exp Q(s, a), by importance sampling over 3N actions, minus Q of the data's action (CQL Eq. 4).
    q_data (2, B), q_sampled (2, B, 3N), log_density (B, 3N) of the distribution each action was sampled from -> (2, B)
    """
    assert q_sampled.shape == (*q_data.shape, log_density.shape[-1])
    return temperature * torch.logsumexp(q_sampled / temperature - log_density, -1) - q_data


class CQL:
    """CQL(H) on SAC, without entropy in the backup (wenzhe-li/romi, CQL/d4rl)."""

    def __init__(self, obs_dim, act_dim, args, device):
        self.args, self.act_dim, self.device = args, act_dim, device
        self.policy = Policy(obs_dim, act_dim, args.hidden).to(device)
        self.qf = QFunctions(obs_dim, act_dim, args.hidden).to(device)
        self.target_qf = QFunctions(obs_dim, act_dim, args.hidden).to(device).requires_grad_(False)
        self.target_qf.load_state_dict(self.qf.state_dict())
        logs = {"sac": torch.zeros(()), "cql": torch.tensor(math.log(max(args.cql_alpha, 1e-8)))}  # log alphas
        self.alphas = nn.ParameterDict(logs).to(device)
        self.target_entropy = -float(act_dim) if args.target_entropy is None else args.target_entropy
        adam = dict(fused=True, capturable=device.type == "cuda")
        self.policy_opt = torch.optim.Adam([*self.policy.parameters(), self.alphas["sac"]], lr=args.policy_lr, **adam)
        self.qf_opt = torch.optim.Adam([*self.qf.parameters(), self.alphas["cql"]], lr=args.qf_lr, **adam)
        self.parts = {k: getattr(self, k) for k in ("policy", "qf", "target_qf", "alphas", "policy_opt", "qf_opt")}
        if args.compile:
            plumbing.compile_methods(self, "policy_loss", "critic_loss")

    def policy_loss(self, obs, act, alpha, warm_up: bool):
        """SAC's objective (arXiv:1812.05905, Eq. 7); in the warm-up the log-likelihood of `act` replaces Q."""
        mean, log_std = self.policy(obs)
        new_act, log_prob = squash(mean, log_std, torch.randn_like(mean))
        gain = squashed_log_prob(mean, log_std, act) if warm_up else self.qf(obs, new_act).amin(0)
        return (alpha * log_prob - gain).mean(), log_prob.detach().mean()

    def critic_loss(self, obs, act, rew, next_obs, terminated):
        """TD error and conservative penalty, each summed over both Q functions, on all rows (CQL Eq. 4)."""
        B, N, A, device = len(obs), self.args.cql_samples, self.act_dim, obs.device
        with torch.no_grad():  # no gradient through sampled actions
            mean, log_std = self.policy(torch.cat([obs, next_obs]))  # (2B, A)
            noise = torch.randn(2 * B, N + 1, A, device=device)  # N proposals, and the action of the TD target
            pi_act, pi_log_prob = squash(mean.unsqueeze(1), log_std.unsqueeze(1), noise)  # (2B, N+1, A), (2B, N+1)
            next_q = self.target_qf(next_obs, pi_act[B:, N]).amin(0)  # (B,)
            target_q = rew + self.args.gamma * (1 - terminated) * next_q  # no entropy in the backup
            # N uniform actions, N from pi(.|s), N from pi(.|s'), all evaluated at s
            acts = torch.cat([2 * torch.rand(B, N, A, device=device) - 1, pi_act[:B, :N], pi_act[B:, :N]], 1)
            uniform_log_density = torch.full((B, N), A * math.log(0.5), device=device)
            log_density = torch.cat([uniform_log_density, pi_log_prob[:B, :N], pi_log_prob[B:, :N]], 1)  # (B, 3N)
        q = self.qf(obs, act)  # (2, B)
        td_loss = (q - target_q).square().mean(1).sum()  # with a factor 1/2 in CQL Eq. 4, without in CQL's code
        with torch.autocast(device.type, torch.bfloat16, enabled=self.args.bf16):
            q_sampled = self.qf(obs.unsqueeze(1).expand(-1, 3 * N, -1), acts)  # (2, B, 3N)
        penalty = conservative_penalty(q, q_sampled, log_density, self.args.cql_temperature).mean(1).sum()
        q_means = {"q/batch": q.detach().mean(), "q/sampled": q_sampled.detach().mean(), "q/target": target_q.mean()}
        return td_loss, penalty, q_means

    def update(self, obs, act, rew, next_obs, terminated, warm_up, clone_only=False):
        """Policy with temperature, Q functions, targets, in this order; returns metrics."""
        alpha = self.alphas["sac"].detach().exp()
        policy_loss, log_prob = self.policy_loss(obs, act, alpha, warm_up)
        descend(self.policy_opt, policy_loss - self.alphas["sac"] * (log_prob + self.target_entropy))
        metrics = {"losses/policy": policy_loss.detach(), "q/entropy": -log_prob, "q/alpha": alpha}
        if clone_only:
            return metrics  # the policy never uses Q
        td_loss, penalty, q_means = self.critic_loss(obs, act, rew, next_obs, terminated)
        critic_loss = td_loss + self.args.cql_alpha * penalty  # CQL Eq. 4
        if self.args.lagrange:  # ascent on alpha (penalty - gap), summed over both Q functions
            cql_alpha = self.alphas["cql"].exp().clamp(max=1e6)
            gap = penalty.detach() - 2 * self.args.lagrange_gap
            critic_loss = td_loss + cql_alpha.detach() * penalty - cql_alpha * gap
        descend(self.qf_opt, critic_loss)
        with torch.no_grad():
            torch._foreach_lerp_(list(self.target_qf.parameters()), list(self.qf.parameters()), self.args.tau)
        return metrics | q_means | {"losses/td": td_loss.detach(), "losses/conservative": penalty.detach()}

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
    """Fills in the task's settings where the user left None; UserError for settings that cannot work."""
    horizon, ratio, policy, priority = SETTINGS[max((k for k in SETTINGS if task.name.startswith(k)), key=len)]
    tuned = {"horizon": horizon, "model_ratio": ratio, "rollout_policy": policy}
    tuned |= {"priority_rollout": priority, "priority_policy": priority}
    args = plumbing.validate(replace(args, **{k: v for k, v in tuned.items() if getattr(args, k) is None}))
    if args.model_ratio > 0 and round(args.model_ratio * args.batch_size) == 0:
        raise UserError(f"--model-ratio {args.model_ratio}: leaves no imagined rows in a batch of {args.batch_size}")
    if args.bc_warmup >= args.total_updates:
        print(f"note: --bc-warmup {args.bc_warmup} covers all updates, so the policy only clones", file=sys.stderr)
    name = "romi_cql" if args.model_ratio > 0 else "bc" if args.bc_warmup >= args.total_updates else "cql"
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
    num_model = round(args.model_ratio * args.batch_size)
    terminates = termination_fn(task, data, args) if num_model else None
    envs = [make_env(task) for _ in range(args.eval_episodes)]
    config = plumbing.describe_run(__file__, args, task, data, device, "reverse", MODEL_FLAGS)
    clone_only = args.model_ratio == 0 and args.bc_warmup >= args.total_updates
    config["args"]["bc_warmup"] = "to the end" if clone_only else args.bc_warmup  # neither kind resumes the other
    run = Run(args, config)
    if run.finished:
        return
    obs_dim, act_dim, returns = data.obs.shape[1], data.act.shape[1], data.trajectory_returns()
    rows = pack(data.obs, data.act, data.rew, data.next_obs, data.terminated).to(device)
    draw_real = row_sampler(rows, returns if args.priority_policy else None)
    if num_model:  # each phase has its own seed, so a resumed run imagines the same rows again
        obs, act, rew, next_obs, _ = unpack(rows[data.has_next.to(device)], obs_dim, act_dim)
        cond, pred = next_obs, obs  # backwards
        torch.manual_seed(4 * args.seed)
        dynamics = train_dynamics(cond, act, rew, pred, args, run)  # ROMI Eq. 2; Alg. 1, l. 2-5
        torch.manual_seed(4 * args.seed + 1)
        rollout_policy = train_rollout_policy(cond, act, args, run)  # l. 6-9
        torch.manual_seed(4 * args.seed + 2)
        starts = row_sampler(data.obs.to(device), returns if args.priority_rollout else None)
        imagined, chains = imagine(starts, dynamics, rollout_policy, terminates, args)  # l. 10-14
        draw_imagined = row_sampler(imagined)  # from D_model

    torch.manual_seed(4 * args.seed + 3)  # the learner starts from the same networks with and without a model
    agent = CQL(obs_dim, act_dim, args, device)
    for step in run.steps("agent", args.total_updates, args.checkpoint_every, **agent.parts):
        if num_model and step == 1:  # here, so that a resumed run does not log it again
            run.log(0, describe_imagination(task, *unpack(imagined, obs_dim, act_dim), chains[::-1], run.folder))
        batch = draw_real(args.batch_size - num_model)
        if num_model:
            batch = torch.cat([batch, draw_imagined(num_model)])  # l. 15
        metrics = agent.update(*unpack(batch, obs_dim, act_dim), step <= args.bc_warmup, clone_only)  # l. 16
        if step % args.log_every == 0 or step == args.total_updates:
            run.log(step, metrics)
        if args.eval_episodes and (step % args.eval_every == 0 or step == args.total_updates):
            run.log(step, evaluate(task, envs, agent.act, args.seed, args.gamma, run.folder))
    run.finish()


if __name__ == "__main__":
    plumbing.run_script(main, Args, __doc__)
