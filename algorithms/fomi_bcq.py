"""FOMI-BCQ: ROMI-BCQ turned forward (ROMI Sec. 4.3), the ablation of the direction of imagination.

Papers: Wang et al. 2021, arXiv:2110.00188 (ROMI); Fujimoto et al. 2019, arXiv:1812.02900 (BCQ). Code: wenzhe-li/romi,
sfujim/BCQ (continuous_BCQ).

  forward model    p(s', r | s, a): ensemble of Gaussians         maximum likelihood on the data       ROMI Eq. 2
  rollout policy   G(a | s): conditional VAE                      variational bound on the data        ROMI Eq. 3
                   or pi(a | s): behaviour cloning                maximum likelihood on the data       ROMI Eq. 4
                   or uniform on [-1, 1]^A
  imagination      a ~ G(.|s), (s', r) ~ p(.|s, a), then s <- s', h times, from states of the data     ROMI Alg. 1
  learner          BCQ on batches with a share eta of imagined transitions                             ROMI Alg. 1
                   y = r + gamma (1-d) max_i [lambda min_j Q'_j(s', a_i) + (1-lambda) max_j Q'_j(s', a_i)]   BCQ Eq. 13
                   a_i = a + xi'(s', a), a ~ VAE(.|s'): BCQ's generator, of actions in s'                    BCQ Alg. 1
                   xi <- argmax Q_1(s, a + xi(s, a)), a ~ VAE(.|s), |xi| <= phi                              BCQ Eq. 12

    python algorithms/fomi_bcq.py --env maze2d-umaze
    python algorithms/fomi_bcq.py --env maze2d-umaze --model-ratio 0        # BCQ

Where paper and code disagree, we follow the code: the KL term has a quarter of its weight in Eq. 3, sampled latents are
clipped to +-0.5, every batch has the same share of imagined transitions, a rollout ends with the first transition whose
s' is terminal, rollouts start from the data's s, not s', and starts and real transitions are sampled in proportion to
their trajectory's return minus the lowest (not on maze2d, see SETTINGS). On antmaze only trajectories that reach the
goal are left. BCQ's generator trains on mixed batches, so it also imitates imagined actions. "l." is a line of ROMI's
Algorithm 1. Differences from the code:
  1. Batches are split exactly: round(eta B) imagined transitions, the rest real.
  2. Sampling by return is exact and with replacement, not from a sum tree; uniform if all weights are 0.
  3. Transitions at time limits are used if their successor was recorded; the code drops them. Terminal transitions
     train the models; in the code only on antmaze.
  4. RBC minimises Eq. 4; the code adds half an entropy bonus, takes the std for the variance and counts unused buffer
     rows in the inputs' mean and std. tanh's correction log(1 - a^2) is exact, without + 1e-6.
  5. Elites are chosen on the holdout set of training; the code draws a new one. An antmaze's goal is estimated from
     rewarded positions; the code asks the environment. Hopper rollouts end below -100, too, not only above 100.
"""

import copy
import math
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
import tyro
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import nn

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # after the script's folder, so copied modules come first
import plumbing
from plumbing import Decays, Episodes, Name, NonNegative, Positive, Seed, Share, UserError
from utils import check_ends, describe_imagination, evaluate, load_dataset, make_env, pack, parse_task, unpack


@dataclass
class Args:
    # --- experiment ---
    env: Annotated[str, tyro.conf.arg(aliases=["--env-id"])] = "maze2d-umaze"  # D4RL task or Minari id
    exp_name: Name | None = None  # None: fomi_bcq; bcq without model
    seed: Seed = 0
    total_updates: PositiveInt = 1_000_000  # gradient updates of the learner; raise it to continue a finished run
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    num_threads: PositiveInt | None = None  # CPU threads; None: all cores
    compile: bool = False  # torch.compile the losses; on a GPU with CUDA graphs
    bf16: bool = False  # bfloat16 in the learner's hidden layers
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
    vae_hidden: PositiveInt = 750  # width of the 2 hidden layers of encoder and decoder, also in BCQ's generator
    kl_weight: NonNegative = 0.5  # weight of the mean KL in the rollout policy's CVAE; ROMI Eq. 3 would be 2
    latent_clip: Annotated[float, Field(gt=0)] = 0.5  # bound on the rollout CVAE's sampled latents; paper: inf
    rbc_hidden: PositiveInt = 256  # width of the 2 hidden layers
    rbc_entropy: NonNegative = 0.0  # weight of an entropy bonus; code: 0.5

    # --- learner ---
    batch_size: PositiveInt = 100  # real and imagined transitions together
    gamma: Share = 0.99  # discount
    tau: Share = 0.005  # target network update rate
    hidden: tuple[PositiveInt, PositiveInt] = (400, 300)  # hidden layer sizes of perturbation and Q functions
    lr: Positive = 1e-3  # Q functions, perturbation and generator
    lmbda: Share = 0.75  # weight of the smaller of the two Q values in the target (lambda)
    phi: NonNegative = 0.05  # bound on the perturbation
    bcq_samples: PositiveInt = 10  # generated actions per next state in the TD target
    eval_samples: PositiveInt = 100  # generated actions per state when acting; the one with the largest Q_1 is executed


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


class Perturbation(nn.Module):
    """a + xi(s, a), clipped to [-1, 1]; xi lies within +- phi."""

    def __init__(self, obs_dim, act_dim, hidden, phi):
        super().__init__()
        self.phi, self.net = phi, mlp(obs_dim + act_dim, *hidden, act_dim)

    def forward(self, obs, act):
        """obs (B, O), act (B, A) -> (B, A)"""
        return (act + self.phi * self.net(torch.cat([obs, act], -1)).tanh()).clamp(-1, 1)


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
    """Forward rollouts until the buffer is full (ROMI Alg. 1, l. 10-14); starts: size -> data states (size, O).
    Returns rows (M, 2 O + A + 2) and up to 500 chains for inspection: h lists [obs, act, next_obs] in rollout order."""
    M = args.model_buffer_size
    num_starts = min(args.rollout_batch_size, math.ceil(M / args.horizon))  # a small buffer gets whole chains, too
    buffer, filled, chains, bar = None, 0, [], plumbing.progress(M, "imagination", "row")
    while filled < M:  # l. 11
        cond = starts(num_starts)  # states s, l. 12
        for _ in range(args.horizon):  # the h steps of l. 13
            act = rollout_policy(cond)  # a ~ G(.|s), l. 13
            pred, rew = dynamics.sample(cond, act)  # s', r ~ p(.|s, a), l. 13
            obs, next_obs = cond, pred
            terminated = terminates(obs, act, next_obs)  # next_obs is the imagined state
            rows = pack(obs, act, rew, next_obs, terminated)[: M - filled]
            buffer = rows.new_empty(M, rows.shape[1]) if buffer is None else buffer
            buffer[filled : filled + len(rows)] = rows  # l. 14
            filled += len(rows)
            if len(chains) < args.horizon:  # the first batch; a chain that ends is dropped from earlier steps, too
                n = len(chains[0][0]) if chains else min(500, len(rows))
                chains = [[x[:n][~terminated[:n]] for x in step] for step in (*chains, (obs, act, next_obs))]
            cond = pred[~terminated]  # one step forward in time; chains that ended stop
        bar.update(filled - bar.n)
    bar.close()
    return buffer, chains


# --- learner ---


def soft_clipped_value(q, lmbda):
    """lambda min_j Q_j + (1 - lambda) max_j Q_j, then the best action of each state (BCQ Eq. 13): (2, B, N) -> (B,)"""
    return (lmbda * q.amin(0) + (1 - lmbda) * q.amax(0)).amax(1)


class BCQ:
    """Batch-constrained Q-learning, continuous (sfujim/BCQ, continuous_BCQ/BCQ.py)."""

    def __init__(self, obs_dim, act_dim, args, device):
        self.args, self.device = args, device
        self.vae = ConditionalVAE(obs_dim, act_dim, args.vae_hidden).to(device)  # the generator, conditioned on s
        self.perturb = Perturbation(obs_dim, act_dim, args.hidden, args.phi).to(device)
        self.target_perturb = Perturbation(obs_dim, act_dim, args.hidden, args.phi).to(device).requires_grad_(False)
        self.target_perturb.load_state_dict(self.perturb.state_dict())
        self.qf = QFunctions(obs_dim, act_dim, args.hidden).to(device)
        self.target_qf = QFunctions(obs_dim, act_dim, args.hidden).to(device).requires_grad_(False)
        self.target_qf.load_state_dict(self.qf.state_dict())
        adam = dict(lr=args.lr, fused=True, capturable=device.type == "cuda")
        self.vae_opt = torch.optim.Adam(self.vae.parameters(), **adam)
        self.perturb_opt = torch.optim.Adam(self.perturb.parameters(), **adam)
        self.qf_opt = torch.optim.Adam(self.qf.parameters(), **adam)
        names = ("vae", "perturb", "target_perturb", "qf", "target_qf", "vae_opt", "perturb_opt", "qf_opt")
        self.parts = {k: getattr(self, k) for k in names}
        self.autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=args.bf16)
        if args.compile:
            plumbing.compile_methods(self, "vae_loss", "critic_loss", "perturb_loss")

    def vae_loss(self, obs, act):
        """BCQ Alg. 1: the generator's variational bound on the batch."""
        return self.vae.loss(obs, act)

    def critic_loss(self, obs, act, rew, next_obs, terminated):
        """TD error against the soft-clipped value of the best of N generated, perturbed actions (BCQ Eq. 13)."""
        B, N = len(obs), self.args.bcq_samples
        with torch.no_grad():
            rep = next_obs.repeat_interleave(N, 0)  # (B N, O)
            next_act = self.target_perturb(rep, self.vae.sample(rep))  # (B N, A)
            next_q = self.target_qf(rep, next_act).view(2, B, N)
            next_value = soft_clipped_value(next_q, self.args.lmbda)
            target_q = rew + self.args.gamma * (1 - terminated) * next_value  # (B,)
        q = self.qf(obs, act)  # (2, B)
        return (q - target_q).square().mean(1).sum(), {"q/batch": q.detach().mean(), "q/target": target_q.mean()}

    def perturb_loss(self, obs):
        """-Q_1 of one generated, perturbed action per state (BCQ Eq. 12)."""
        with torch.no_grad():
            act = self.vae.sample(obs)
        return -self.qf.q1(torch.cat([obs, self.perturb(obs, act)], -1)).mean()

    def update(self, obs, act, rew, next_obs, terminated):
        """Generator, Q functions, perturbation, targets, in this order; returns metrics."""
        with self.autocast():  # one context per loss: autocast caches bfloat16 weights, which a step makes stale
            vae_loss = self.vae_loss(obs, act)
        descend(self.vae_opt, vae_loss)
        with self.autocast():
            critic_loss, q_means = self.critic_loss(obs, act, rew, next_obs, terminated)
        descend(self.qf_opt, critic_loss)
        with self.autocast():
            perturb_loss = self.perturb_loss(obs)
        descend(self.perturb_opt, perturb_loss)
        with torch.no_grad():
            target = [*self.target_qf.parameters(), *self.target_perturb.parameters()]
            torch._foreach_lerp_(target, [*self.qf.parameters(), *self.perturb.parameters()], self.args.tau)
        losses = {"losses/vae": vae_loss, "losses/critic": critic_loss, "losses/perturb": perturb_loss}
        return {k: v.detach() for k, v in losses.items()} | q_means

    @torch.no_grad()
    def act(self, obs):
        """The generated action with the largest Q_1: obs (B, O) -> (B, A), on the CPU"""
        B, N = len(obs), self.args.eval_samples
        rep = obs.to(self.device).repeat_interleave(N, 0)  # (B N, O)
        acts = self.perturb(rep, self.vae.sample(rep))  # (B N, A)
        best = self.qf(rep, acts)[0].view(B, N).argmax(1)
        return acts.view(B, N, -1)[torch.arange(B, device=self.device), best].cpu()


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
    name = "fomi_bcq" if args.model_ratio > 0 else "bcq"
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
    config = plumbing.describe_run(__file__, args, task, data, device, "forward", MODEL_FLAGS)
    run = Run(args, config)
    if run.finished:
        return
    obs_dim, act_dim, returns = data.obs.shape[1], data.act.shape[1], data.trajectory_returns()
    rows = pack(data.obs, data.act, data.rew, data.next_obs, data.terminated).to(device)
    draw_real = row_sampler(rows, returns if args.priority_policy else None)
    if num_model:  # each phase has its own seed, so a resumed run imagines the same rows again
        obs, act, rew, next_obs, _ = unpack(rows[data.has_next.to(device)], obs_dim, act_dim)
        cond, pred = obs, next_obs  # forwards
        torch.manual_seed(4 * args.seed)
        dynamics = train_dynamics(cond, act, rew, pred, args, run)  # ROMI Eq. 2; Alg. 1, l. 2-5
        torch.manual_seed(4 * args.seed + 1)
        rollout_policy = train_rollout_policy(cond, act, args, run)  # l. 6-9
        torch.manual_seed(4 * args.seed + 2)
        starts = row_sampler(data.obs.to(device), returns if args.priority_rollout else None)
        imagined, chains = imagine(starts, dynamics, rollout_policy, terminates, args)  # l. 10-14
        draw_imagined = row_sampler(imagined)  # from D_model

    torch.manual_seed(4 * args.seed + 3)  # the learner starts from the same networks with and without a model
    agent = BCQ(obs_dim, act_dim, args, device)
    for step in run.steps("agent", args.total_updates, args.checkpoint_every, **agent.parts):
        if num_model and step == 1:  # here, so that a resumed run does not log it again
            run.log(0, describe_imagination(task, *unpack(imagined, obs_dim, act_dim), chains, run.folder))
        batch = draw_real(args.batch_size - num_model)
        if num_model:
            batch = torch.cat([batch, draw_imagined(num_model)])  # l. 15
        metrics = agent.update(*unpack(batch, obs_dim, act_dim))  # l. 16
        if step % args.log_every == 0 or step == args.total_updates:
            run.log(step, metrics)
        if args.eval_episodes and (step % args.eval_every == 0 or step == args.total_updates):
            run.log(step, evaluate(task, envs, agent.act, args.seed, args.gamma, run.folder))
    run.finish()


if __name__ == "__main__":
    plumbing.run_script(main, Args, __doc__)
