"""SRA-TD3+BC: offline imitation with self-paced reverse augmentation, TD3+BC as the learner.

No rewards: a few expert trajectories D^E show what to do, a large supplementary dataset D^S what is possible.
Papers: Shao et al. 2024, arXiv:2406.12550 (SRA; lines and equations: the authors' KDD slides); Fujimoto
and Gu 2021, arXiv:2106.06860 (TD3+BC); Fujimoto et al. 2018, arXiv:1802.09477 (TD3); Wang et al. 2021,
arXiv:2110.00188 (ROMI). Code: sh-jj/SRA-KDD-2024; for the learner: tinkoff-ai/CORL (td3_bc.py).

  reverse model    s = T(s', a): mean of 7 networks         squared error on D^E + D^S          SRA Alg. 1, l. 1-3
  reverse policy   pi_r(a | s'): CVAE, or uniform           variational bound on D^E + D^S      l. 4-6, ROMI Eq. 3
  goals            G = {s in D^S: Conf(s) > c} + D^E        Conf(s) = pi_c(E[a|s] | s)          l. 8, SRA Eq. 4
  augmentation     s' ~ G, a ~ pi_r(.|s'), s = T(s', a)     h steps back from the goals         l. 9, SRA Eq. 2
                   D^R: kept with weights 1 / Conf(s)       where pi_c is unsure                l. 10, SRA Eq. 5
  labels           reward 1 on D^E, 0 on D^S and D^R        as in the code and UDS, arXiv:2202.01741
  learner          Q: (Q_j - r - gamma min_k Q'_k(s', a'))^2    a' = pi'(s') + clipped noise    l. 12, TD3
                   pi: -lambda E[Q_1(s, pi(s))] + MSE + MSE_DE  MSE = E[(pi(s) - a)^2]          TD3+BC
                                                                lambda = alpha / E|Q_1|
                   pi_c: -E_DE[log pi_c]                        used for Conf only

    python algorithms/sra_td3bc.py --env maze2d-umaze
    python algorithms/sra_td3bc.py --env maze2d-umaze --model-ratio 0     # UDS + TD3+BC + BC, the control

Half of each batch is expert transitions; of the rest a share eta is D^R (30 % from the last round), the others D^S.
Where slides and code disagree, we follow the code: T by squared error (slides: likelihood), c a quantile of Conf on D^E
(slides: its mean), 90 % of start states from D^E, each imagined step resampled, the next starting from what is kept.
Table 4 of the slides has results with this learner; settings and code are unpublished. All but the learner is as in
sra_iql.py, including its differences from the code. Our choices for the learner:
  1. The density of a deterministic policy at its own action is infinite. Conf is that of a second policy pi_c, which
     clones the experts, so goals and rounds do not depend on what TD3+BC has learnt.
  2. The squared error covers all transitions, also imagined ones, and the expert half once more.
  3. Weight decay is kept, although it weighs more against a squared error, with its smaller gradients, than against a
     likelihood. The Q loss is the mean of both errors (TD3: their sum).
  4. Labels are 0 or 1, so Q is at most 1 / (1 - gamma); q/largest and q/largest_target show whether it stays below.
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
from plumbing import Episodes, Name, NonNegative, Positive, Seed, Share, UserError
from utils import describe_augmentation, evaluate, load_dataset, load_expert, make_env, pack, parse_task, unpack


@dataclass
class Args:
    # --- experiment ---
    env: Annotated[str, tyro.conf.arg(aliases=["--env-id"])] = "maze2d-umaze"  # D4RL task or Minari id
    exp_name: Name | None = None  # None: sra_td3bc; uds_td3bc without model
    seed: Seed = 0
    total_updates: PositiveInt | None = None  # gradient updates of the learner; None: by task
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
    expert_dataset: str = "auto"  # auto (expert data; on maze2d the planner's), a Minari id, or an HDF5 or npz file
    expert_trajectories: PositiveInt = 5  # number of demonstrations used, the first ones in the file
    eval_every: PositiveInt = 5_000  # updates
    eval_episodes: Episodes = 30  # per evaluation (use 100 for antmaze), greedy; 0: no simulator

    # --- dynamics ---
    ensemble_size: PositiveInt = 7  # ensemble members
    # hidden layer sizes
    dynamics_layers: Annotated[tuple[PositiveInt, ...], tyro.conf.arg(aliases=["--dynamics-hidden"])] = (1024, 1024)
    dynamics_bf16: bool = False  # bfloat16 in the model's hidden layers
    dynamics_optimizer: Literal["sgd", "adam"] = "sgd"  # sgd: with Nesterov momentum 0.9, as in the code
    dynamics_learning_rate: Positive | None = None  # None: 1e-4 (sgd), 1e-3 (adam)
    dynamics_clip: Positive = 1.0  # maximum gradient norm of a member
    dynamics_batch_size: PositiveInt = 256
    dynamics_epochs: Annotated[PositiveInt, tyro.conf.arg(aliases=["--dynamics-max-epochs"])] = 20  # no early stopping
    dynamics_from: str | None = None  # dynamics.pt of a run with the same data, seed and model settings

    # --- rollout ---
    horizon: PositiveInt | None = None  # rollout length (h); None: by task
    model_ratio: Share | None = None  # share of imagined rows in a batch's second half (eta); 0: UDS; None: by task
    rollout_policy: Literal["cvae", "uniform"] | None = None  # source of imagined actions; None: by task
    warmup: NonNegativeInt | None = None  # updates before the first round of augmentation; None: by task
    rollout_every: PositiveInt = 50_000  # updates between rounds of rollouts
    augmented_rows: Annotated[PositiveInt, tyro.conf.arg(aliases=["--model-buffer-size"])] = 4_000_000  # in all rounds
    rollout_rows: PositiveInt | None = None  # imagined rows per round; None: --augmented-rows divided by the rounds
    rollout_batch_size: PositiveInt = 2_000  # start states per model call
    oversampling: PositiveInt = 2  # imagined transitions per one that is kept
    threshold: Literal["quantile", "mean"] = "quantile"  # of Conf on expert states: other states above it are goals
    threshold_quantile: Share = 0.8
    goal_cap: PositiveInt = 10  # keep at most this many confident states per expert state; ignored with the mean
    expert_starts: Share = 0.9  # share of rollouts that start at expert states
    new_ratio: Share = 0.3  # share of the last round in imagined rows, and in start states other than the expert's
    rollout_policy_updates: PositiveInt = 200_000  # gradient updates of a learnt rollout policy
    rollout_policy_batch_size: PositiveInt = 256
    rollout_policy_lr: Positive = 1e-3
    vae_hidden: PositiveInt = 750  # width of the 2 hidden layers of encoder and decoder
    kl_weight: NonNegative = 0.5  # weight of the mean KL in the rollout policy's CVAE; ROMI Eq. 3 would be 2
    latent_clip: Annotated[float, Field(gt=0)] = 0.5  # bound on the rollout CVAE's sampled latents; paper: inf

    # --- learner ---
    batch_size: PositiveInt = 512  # real and imagined transitions together
    gamma: Share = 0.99  # discount
    tau: Share = 0.005  # target network update rate
    hidden: tuple[PositiveInt, ...] = (256, 256)  # hidden layer sizes of policy and Q functions
    learning_rate: Positive | None = None  # of all learner networks; None: by task
    learning_rate_drop: NonNegativeInt | None = None  # updates until the rate drops to a tenth; 0: never; None: by task
    cosine_updates: NonNegativeInt = 500_000  # updates until a cosine takes the policy's rate to 0; 0: constant
    weight_decay: NonNegative = 5e-3  # Adam's, added to the gradient, on all weights and biases
    bc_weight: NonNegative = 1.0  # weight of cloning the experts; 0: the plain learner
    alpha: NonNegative = 2.5  # weight of Q_1, divided by its mean magnitude, against cloning of all rows
    policy_noise: NonNegative = 0.2  # standard deviation of the noise on the target policy's actions
    noise_clip: NonNegative = 0.5  # bound on that noise
    policy_delay: PositiveInt = 2  # updates of the Q functions per update of policy and targets


# Updates, learning rate, eta, h, reverse policy: sh-jj/SRA-KDD-2024, sra_iql_maze.sh (sparse), sra_iql_mujoco.sh
# (*-medium); warm-up: default of sra_iql.py, maze2d ours. The longest key that is a prefix of the task's name applies.
SETTINGS = {
    "maze2d-umaze": (200_000, 1e-3, 0.7, 5, "uniform", 0),
    "maze2d": (200_000, 1e-3, 0.5, 5, "uniform", 0),
    "hopper": (500_000, 1e-4, 0.5, 5, "uniform", 200_000),
    "halfcheetah": (500_000, 1e-4, 0.1, 1, "cvae", 200_000),
    "walker2d": (500_000, 1e-4, 0.1, 1, "cvae", 200_000),
    "ant-": (500_000, 1e-4, 0.1, 1, "cvae", 200_000),
    "": (500_000, 1e-4, 0.1, 1, "cvae", 200_000),  # ours: any other environment
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


class Normalizer(nn.Module):
    """Normalises states to mean 0 and standard deviation 1 (+ 1e-3) over all data, for everything but the simulator."""

    def __init__(self, obs):
        super().__init__()
        self.register_buffer("mean", obs.mean(0))
        std = obs.std(0, unbiased=False)
        self.register_buffer("std", torch.where(std < 1e-6 * (1 + self.mean.abs()), 1.0, std + 1e-3))  # 1 if constant

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
        return mean.clamp(-9, 9), log_std.clamp(-5, 2)  # clamping the mean bounds the confidence

    @torch.no_grad()
    def log_confidence(self, obs):
        """log Conf(s) = log pi(E[a|s] | s), where tanh(mean) stands for E[a|s], as in the code: (B, O) -> (B,)"""
        outputs = (self(chunk) for chunk in obs.split(10_000))
        return torch.cat([squash(mean, log_std, torch.zeros_like(mean))[1] for mean, log_std in outputs])


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


def descend(opt, loss):
    """One gradient step on the optimizer's parameters; no other parameter gets a gradient."""
    opt.zero_grad()
    loss.backward(inputs=[p for group in opt.param_groups for p in group["params"]])
    opt.step()


# --- dynamics model ---


class ReverseDynamics(nn.Module):
    """s = T(s', a): the mean of E networks that predict s - s'."""

    def __init__(self, obs_dim, act_dim, args):
        super().__init__()
        self.args, sizes = args, [obs_dim + act_dim, *args.dynamics_layers, obs_dim]
        self.weight, self.bias = nn.ParameterList(), nn.ParameterList()
        for n, m in zip(sizes, sizes[1:], strict=False):  # PyTorch's default initialisation
            self.weight.append(torch.empty(args.ensemble_size, n, m).uniform_(-(n**-0.5), n**-0.5))
            self.bias.append(torch.empty(args.ensemble_size, 1, m).uniform_(-(n**-0.5), n**-0.5))
        self.register_buffer("best_mse", torch.full((args.ensemble_size,), 1e38))  # on the training rows of an epoch

    def forward(self, x):
        """x (E, B, O+A) -> s - s', (E, B, O)"""
        last = len(self.weight) - 1
        for i, (w, b) in enumerate(zip(self.weight, self.bias, strict=True)):
            layer = (b, x, w)
            if self.args.dynamics_bf16:
                layer = [t.to(torch.bfloat16 if 0 < i < last else torch.float32) for t in layer]
            x = torch.baddbmm(*layer)
            x = F.relu_(x) if i < last else x
        return x

    def loss(self, x, target):
        """Mean squared error of each member over rows and dimensions: (E,)"""
        return (self(x) - target).square().mean((1, 2))

    @torch.no_grad()
    def predict(self, next_obs, act):
        """s of s' and a: (B, O), (B, A) -> (B, O)"""
        chunks = torch.cat([next_obs, act], -1).split(self.args.rollout_batch_size)
        return next_obs + torch.cat([self(x.expand(self.args.ensemble_size, -1, -1)).mean(0) for x in chunks])

    @torch.no_grad()
    def keep_best(self, current, mse):
        """Copy members of `current` whose error, mse (E,), is their lowest so far."""
        improved = mse < self.best_mse
        for kept, p in zip(self.parameters(), current.parameters(), strict=True):
            kept[improved] = p[improved]
        self.best_mse[improved] = mse[improved]

    def optimizer(self):
        lr = self.args.dynamics_learning_rate
        if self.args.dynamics_optimizer == "adam":
            return torch.optim.Adam(self.parameters(), lr=lr, fused=True)
        return torch.optim.SGD(self.parameters(), lr=lr, momentum=0.9, nesterov=True, fused=True)


def clip_member_gradients(parameters, largest):
    """Clip the gradient norm of each member (first axis of every tensor) to `largest`."""
    norm = torch.stack([p.grad.flatten(1).norm(dim=1) for p in parameters]).norm(dim=0)  # (E,)
    scale = (largest / (norm + 1e-6)).clamp(max=1)[:, None, None]
    for p in parameters:
        p.grad.mul_(scale)


def train_reverse_dynamics(obs, act, next_obs, args, run):
    """Squared error on all rows, for a given number of epochs, without holdout."""
    device, E, N = obs.device, args.ensemble_size, len(obs)
    current = ReverseDynamics(obs.shape[1], act.shape[1], args).to(device)
    dynamics, opt = copy.deepcopy(current), current.optimizer()  # `dynamics` keeps each member's best epoch
    x, y = torch.cat([next_obs, act], -1), obs - next_obs
    some = torch.linspace(0, N - 1, min(N, 20_000), device=device).long()
    loss_fn = torch.compile(current.loss) if args.compile else current.loss
    for epoch in run.steps("dynamics", args.dynamics_epochs, 1, dynamics=dynamics, current=current, opt=opt):
        rows = torch.stack([torch.randperm(N, device=device) for _ in range(E)])  # (E, N): a new order per member
        total = torch.zeros(E, device=device)
        for idx in plumbing.bar(rows.split(args.dynamics_batch_size, 1), f"epoch {epoch}"):  # (E, B)
            loss = loss_fn(x[idx], y[idx])  # (E,)
            opt.zero_grad()
            loss.sum().backward()
            clip_member_gradients(list(current.parameters()), args.dynamics_clip)
            opt.step()
            total += loss.detach()
        mse = total / math.ceil(N / args.dynamics_batch_size)
        dynamics.keep_best(current, mse)
        error = (dynamics.predict(next_obs[some], act[some]) - obs[some]).square().mean(0)  # (O,)
        variance = y[some].var(0, unbiased=False)
        fit = {"best_mse": dynamics.best_mse.mean(), "explained_variance": 1 - error.mean() / variance.mean()}
        fit |= {"explained_variance_worst": (1 - error / variance.clamp(min=1e-12)).amin()}  # of the worst dimension
        run.log(0, {"model/epoch": epoch, "losses/dynamics": mse.mean()} | {f"model/{k}": v for k, v in fit.items()})
    return dynamics


# --- rollout ---


def train_reverse_policy(next_obs, act, args, run):
    """Uniform, or a CVAE trained on the data (SRA Alg. 1, l. 4-6). Returns next_obs (B, O) -> act (B, A)."""
    obs_dim, act_dim = next_obs.shape[1], act.shape[1]
    if args.rollout_policy == "uniform":
        return lambda next_obs: 2 * torch.rand(len(next_obs), act_dim, device=next_obs.device) - 1
    policy = ConditionalVAE(obs_dim, act_dim, args.vae_hidden, args.kl_weight, args.latent_clip).to(act.device)
    opt = torch.optim.Adam(policy.parameters(), lr=args.rollout_policy_lr, fused=True)
    loss_fn = torch.compile(policy.loss) if args.compile else policy.loss
    total, every = args.rollout_policy_updates, args.checkpoint_every
    for step in run.steps("rollout_policy", total, every, rollout_policy=policy, opt=opt):
        idx = torch.randint(len(act), (args.rollout_policy_batch_size,), device=act.device)
        loss = loss_fn(next_obs[idx], act[idx])
        descend(opt, loss)
        if step % args.log_every == 0:
            run.log(0, {"model/rollout_policy_update": step, "losses/rollout_policy": loss})
    return policy.sample


def draw(rows, size):
    """`size` of `rows`, sampled uniformly with replacement."""
    return rows[torch.randint(len(rows), (size,), device=rows.device)]


def confident_states(policy, expert, supplementary, args):
    """Goals other than the expert states (N, O): supplementary states (M, O) where Conf exceeds its quantile, or its
    mean, over expert states; and that threshold, as log Conf (SRA Eq. 4)."""
    on_expert, log_conf = policy.log_confidence(expert), policy.log_confidence(supplementary)
    if args.threshold == "mean":  # of Conf, not of its logarithm
        threshold = on_expert.logsumexp(0) - math.log(len(expert))
        return supplementary[log_conf >= threshold], threshold
    threshold = on_expert.quantile(args.threshold_quantile)
    rows, cap = (log_conf > threshold).nonzero().squeeze(1), args.goal_cap * len(expert)
    if len(rows) > cap:
        rows = log_conf.topk(cap).indices
    return supplementary[rows], threshold


def start_states(size, expert, older, new, args):
    """Start states of a round, (size, O): expert states, earlier goals and this round's, in exact shares."""
    rest = size - round(args.expert_starts * size) if len(older) + len(new) else 0
    num_new = 0 if not len(new) else rest if not len(older) else round(args.new_ratio * rest)
    draws = ((expert, size - rest), (older, rest - num_new), (new, num_new))
    return torch.cat([draw(pool, n) for pool, n in draws if n])


def resample(log_conf, size):
    """Indices of `size` states sampled without replacement, weights 1 / (Conf + 1e-5): (N,) -> (size,) (SRA Eq. 5)"""
    log_weight = -torch.logaddexp(log_conf, torch.full_like(log_conf, math.log(1e-5)))
    gumbel = -torch.empty_like(log_weight).exponential_().log()  # Gumbel top-k: weighted sampling without replacement
    return (log_weight + gumbel).topk(size).indices


@torch.no_grad()
def augment(starts, policy, reverse_dynamics, reverse_policy, args):
    """A round of reverse rollouts (SRA Alg. 1, l. 9, 10); starts: n -> states (n, O).
    Returns rows (h (S // h), 2 O + A + 2), S = rollout_rows, and metrics."""
    size, kept_rows, confidence = args.rollout_rows // args.horizon, [], []
    for _ in range(args.horizon):
        next_obs = starts(args.oversampling * size)
        act = torch.cat([reverse_policy(chunk) for chunk in next_obs.split(args.rollout_batch_size)])  # Eq. 2
        obs = reverse_dynamics.predict(next_obs, act)  # Eq. 2
        log_conf = policy.log_confidence(obs)
        kept = resample(log_conf, size)  # l. 10
        zeros = torch.zeros(size, device=obs.device)  # reward 0, not terminal
        kept_rows.append(pack(obs[kept], act[kept], zeros, next_obs[kept], zeros))
        confidence.append(torch.stack([log_conf.mean(), log_conf[kept].mean()]))
        starts = partial(draw, obs[kept])  # the next step back starts from what is kept
    means = torch.stack(confidence).mean(0)
    return torch.cat(kept_rows), {"model/log_confidence_imagined": means[0], "model/log_confidence_kept": means[1]}


class AugmentedData:
    """D^R: the rounds of augmentation (SRA Alg. 1, l. 8-10). Its state dict holds policies instead of rows: each round
    has its own seed, so a resumed run imagines the same rows again."""

    def __init__(self, expert, supplementary, policy, reverse_dynamics, reverse_policy, args):
        """expert (N, O), supplementary (M, O): states; policy: gets the weights of each round"""
        self.expert, self.supplementary, self.policy, self.args = expert, supplementary, policy, args
        self.models = reverse_dynamics, reverse_policy
        self.rounds, self.goals, self.older, self.new = [], expert[:0], None, None

    def add(self, step, weights):
        """Adds a round after `step` updates, with the policy of these weights (a state dict); returns metrics."""
        self.policy.load_state_dict(weights)
        with torch.random.fork_rng():
            torch.manual_seed(1_000_000 * (4 * self.args.seed + 2) + len(self.rounds))
            goals, threshold = confident_states(self.policy, self.expert, self.supplementary, self.args)  # l. 8
            starts = partial(start_states, expert=self.expert, older=self.goals, new=goals, args=self.args)
            rows, stats = augment(starts, self.policy, *self.models, self.args)
        if not rows.isfinite().all():
            raise UserError("imagined states are not finite; lower --dynamics-learning-rate", status=3)
        self.rounds.append((step, {k: v.clone() for k, v in weights.items()}))
        self.goals = torch.cat([self.goals, goals])
        self.older, self.new = self.new if self.older is None else torch.cat([self.older, self.new]), rows
        return stats | {"model/goals": len(goals), "model/log_confidence_threshold": threshold}

    def __call__(self, size):
        """Rows of the last round and of earlier ones, in exact shares."""
        num_new = size if self.older is None else round(self.args.new_ratio * size)
        draws = ((self.new, num_new), (self.older, size - num_new))
        return torch.cat([draw(rows, n) for rows, n in draws if n])

    def state_dict(self):
        return {"rounds": self.rounds}

    def load_state_dict(self, state):
        for step, weights in state["rounds"]:
            print(f"imagining the round after {step} updates again", file=sys.stderr)
            self.add(step, weights)


# --- learner ---


def usable(data):
    """(N,) bool: rows with a known successor, but no terminal ones, as in the code: nothing terminates in SRA."""
    return data.has_next & (data.terminated == 0)


def labelled(data, reward, normalizer, device):
    """Rows of D^E (reward 1) or D^S (reward 0), states normalised; the data's rewards are ignored (UDS)."""
    obs, act, next_obs = (x[usable(data)].to(device) for x in (data.obs, data.act, data.next_obs))
    rew, terminated = torch.full_like(obs[:, 0], reward), torch.zeros_like(obs[:, 0])
    return pack(normalizer(obs), act, rew, normalizer(next_obs), terminated)


class TD3BC:
    """TD3 with behaviour cloning of all rows and once more of the expert rows (code: CORL, td3_bc.py). Conf is the
    density of the policy `confidence`."""

    def __init__(self, normalizer, obs_dim, act_dim, args, device):
        self.args, self.device, self.normalizer = args, device, normalizer
        sizes = (obs_dim, *args.hidden, act_dim)
        self.policy, self.target_policy = (mlp(*sizes).append(nn.Tanh()).to(device) for _ in range(2))
        self.target_policy.requires_grad_(False).load_state_dict(self.policy.state_dict())
        self.confidence = ClampedPolicy(obs_dim, act_dim, args.hidden).to(device)
        self.qf = QFunctions(obs_dim, act_dim, args.hidden).to(device)
        self.target_qf = QFunctions(obs_dim, act_dim, args.hidden).to(device).requires_grad_(False)
        self.target_qf.load_state_dict(self.qf.state_dict())
        adam = dict(lr=args.learning_rate, weight_decay=args.weight_decay, fused=True, capturable=device.type == "cuda")
        learnt = (self.policy, self.confidence, self.qf)
        self.policy_opt, self.confidence_opt, self.qf_opt = (torch.optim.Adam(f.parameters(), **adam) for f in learnt)
        names = ("normalizer", "policy", "target_policy", "confidence", "qf", "target_qf")
        names += ("policy_opt", "confidence_opt", "qf_opt")
        self.parts = {k: getattr(self, k) for k in names}
        self.autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=args.bf16)
        if args.compile:
            plumbing.compile_methods(self, "critic_loss", "confidence_loss", "policy_loss")

    def critic_loss(self, obs, act, rew, next_obs, terminated):
        """TD error of both Q functions against the smaller target Q of the target policy's action and clipped noise."""
        with torch.no_grad():
            noise = (self.args.policy_noise * torch.randn_like(act)).clamp(-self.args.noise_clip, self.args.noise_clip)
            next_act = (self.target_policy(next_obs) + noise).clamp(-1, 1)
            target_q = rew + self.args.gamma * (1 - terminated) * self.target_qf(next_obs, next_act).amin(0)  # (B,)
        q = self.qf(obs, act)  # (2, B)
        expert, others = q.detach().chunk(2, 1)
        stats = {"q/expert": expert.mean(), "q/others": others.mean(), "q/target": target_q.mean()}
        stats |= {"q/largest": q.detach().amax(), "q/largest_target": target_q.amax()}
        return (q - target_q).square().mean(), stats

    def confidence_loss(self, obs, act):
        """Negative log-likelihood: pi_c clones the experts."""
        return -squashed_log_prob(*self.confidence(obs), act).mean()

    def policy_loss(self, obs, act):
        """Q_1 of the policy's actions over its mean magnitude, cloning of all rows, and again of the expert rows."""
        pi_act = self.policy(obs)
        q = self.qf.q1(torch.cat([obs, pi_act], -1))
        lmbda = self.args.alpha / q.detach().abs().mean()  # a constant for the gradient
        error = (pi_act - act).square()  # (B, A)
        clone = error[: self.args.batch_size // 2].mean()
        loss = -lmbda * q.mean() + error.mean() + self.args.bc_weight * clone
        return loss, {"losses/clone": clone.detach()}

    def set_rates(self, step):
        """The rates of policy and confidence follow a cosine, times 0.1 after the drop. Q's is constant; from the drop
        on it is a tenth of the cosine's value at the drop."""
        full, end, drop = self.args.learning_rate, self.args.cosine_updates, self.args.learning_rate_drop
        cosine, at_drop = (0.5 * (1 + math.cos(math.pi * min(1, t / end))) if end else 1.0 for t in (step - 1, drop))
        dropped = 0 < drop < step
        for opt in (self.policy_opt, self.confidence_opt):
            opt.param_groups[0]["lr"] = full * cosine * (0.1 if dropped else 1.0)
        self.qf_opt.param_groups[0]["lr"] = full * (0.1 * at_drop if dropped else 1.0)

    def update(self, obs, act, rew, next_obs, terminated, step):
        """Q functions, confidence and, in every second update (policy_delay), policy and targets, in this order; the
        first half of a batch is expert rows. Returns metrics, the policy's only when it is updated."""
        self.set_rates(step)
        with self.autocast():  # one context per loss: it caches bfloat16 weights until it ends
            critic_loss, stats = self.critic_loss(obs, act, rew, next_obs, terminated)
        descend(self.qf_opt, critic_loss)
        expert = slice(self.args.batch_size // 2)
        with self.autocast():
            confidence_loss = self.confidence_loss(obs[expert], act[expert])
        descend(self.confidence_opt, confidence_loss)
        losses = {"losses/critic": critic_loss, "losses/confidence": confidence_loss}
        if step % self.args.policy_delay == 0:
            with self.autocast():
                losses["losses/policy"], policy_stats = self.policy_loss(obs, act)
            descend(self.policy_opt, losses["losses/policy"])
            stats |= policy_stats
            with torch.no_grad():
                for target, online in ((self.target_qf, self.qf), (self.target_policy, self.policy)):
                    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), self.args.tau)
        return {k: v.detach() for k, v in losses.items()} | stats

    @torch.no_grad()
    def act(self, obs):
        """obs (B, O), not normalised -> deterministic actions (B, A), on the CPU"""
        return self.policy(self.normalizer(obs.to(self.device))).cpu()


# --- settings and run folder: bookkeeping up to main() ---

# Flags that do not affect training, so a run may be resumed with other values. Rates depend on --total-updates.
BOOKKEEPING = {"run_dir", "checkpoint_every", "log_every", "num_threads", "track", "device", "dataset", "dynamics_from"}
BOOKKEEPING |= {"wandb_project_name", "wandb_entity", "wandb_group", "expert_dataset"}
# Flags that determine a model, besides data and direction: --dynamics-from needs them to be equal.
MODEL_FLAGS = {"seed", "ensemble_size", "dynamics_layers", "dynamics_bf16", "dynamics_optimizer", "dynamics_clip"}
MODEL_FLAGS |= {"dynamics_learning_rate", "dynamics_batch_size"}


def resolve(args, task):
    """Fills in the task's settings where the user left None; UserError for settings that cannot work."""
    key = max((k for k in SETTINGS if task.name.startswith(k)), key=len)
    updates, rate, ratio, horizon, policy, warmup = SETTINGS[key]
    tuned = {"total_updates": updates, "learning_rate": rate, "horizon": horizon, "rollout_policy": policy}
    tuned |= {"warmup": warmup, "dynamics_learning_rate": 1e-4 if args.dynamics_optimizer == "sgd" else 1e-3}
    tuned |= {"model_ratio": ratio}
    args = plumbing.validate(replace(args, **{k: v for k, v in tuned.items() if getattr(args, k) is None}))
    augmented_updates = max(0, args.total_updates - args.warmup) if args.model_ratio > 0 else 0
    rounds = math.ceil(augmented_updates / args.rollout_every)
    tuned = {"learning_rate_drop": args.total_updates // 2 if task.domain == "maze2d" else 0}
    tuned |= {"rollout_rows": args.augmented_rows // rounds if rounds else 0}
    args = replace(args, **{k: v for k, v in tuned.items() if getattr(args, k) is None})
    if 0 < args.cosine_updates < args.total_updates:
        raise UserError(f"--total-updates {args.total_updates}: more than --cosine-updates {args.cosine_updates}")
    if args.batch_size % 2:
        raise UserError(f"--batch-size {args.batch_size}: must be even, as half of a batch is expert rows")
    if args.model_ratio > 0 and round(args.model_ratio * args.batch_size / 2) == 0:
        raise UserError(f"--model-ratio {args.model_ratio}: leaves no imagined rows in a batch of {args.batch_size}")
    if rounds and args.rollout_rows < args.horizon:
        raise UserError(f"--rollout-rows {args.rollout_rows}: fewer than the {args.horizon} steps of a round")
    if args.model_ratio > 0 and not rounds:
        print(f"note: --warmup {args.warmup} covers all updates, so nothing is imagined", file=sys.stderr)
    name = "sra_td3bc" if rounds else "uds_td3bc"
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
    data = load_dataset(task, args.dataset, rewards=False)
    expert = load_expert(task, args.expert_dataset, args.expert_trajectories, data)
    for flag, d in (("dataset", data), ("expert-dataset", expert)):
        if usable(d).sum() < 10:
            raise UserError(f"--{flag} {d.path}: fewer than 10 transitions with a known successor")
    envs = [make_env(task) for _ in range(args.eval_episodes)]
    config = plumbing.describe_run(__file__, args, task, data, device, "reverse", MODEL_FLAGS)
    config["decides"]["dynamics"]["data"] += f" {expert.sha256} {args.expert_trajectories}"  # it learns from both
    run = Run(args, config)
    if run.finished:
        return
    obs_dim, act_dim, half = data.obs.shape[1], data.act.shape[1], args.batch_size // 2
    normalizer = Normalizer(torch.cat([d.obs[usable(d)] for d in (expert, data)])).to(device)
    expert_rows, rows = labelled(expert, 1.0, normalizer, device), labelled(data, 0.0, normalizer, device)
    augmenting = args.model_ratio > 0 and args.warmup < args.total_updates

    if augmenting:  # each phase has its own seed, so a resumed run imagines the same rows again
        obs, act, _, next_obs, _ = unpack(torch.cat([expert_rows, rows]), obs_dim, act_dim)
        torch.manual_seed(4 * args.seed)
        dynamics = train_reverse_dynamics(obs, act, next_obs, args, run)  # SRA Alg. 1, l. 1-3
        torch.manual_seed(4 * args.seed + 1)
        reverse_policy = train_reverse_policy(next_obs, act, args, run)  # l. 4-6
        policy = ClampedPolicy(obs_dim, act_dim, args.hidden).to(device)
        states = expert_rows[:, :obs_dim], rows[:, :obs_dim]
        imagined = AugmentedData(*states, policy, dynamics, reverse_policy, args)

    torch.manual_seed(4 * args.seed + 3)  # the learner starts from the same networks with and without a model
    agent = TD3BC(normalizer, obs_dim, act_dim, args, device)
    parts = agent.parts | ({"imagined": imagined} if augmenting else {})
    for step in run.steps("agent", args.total_updates, args.checkpoint_every, **parts):  # l. 7
        num_model = 0
        if augmenting and step > args.warmup:
            num_model, updates = round(args.model_ratio * half), step - 1
            if (updates - args.warmup) % args.rollout_every == 0:
                stats = imagined.add(updates, agent.confidence.state_dict())  # l. 8-10
                obs, act, _, next_obs, _ = unpack(imagined.new, obs_dim, act_dim)
                look = describe_augmentation(task, *states, obs, act, next_obs, normalizer.inverse, run.folder, updates)
                run.log(updates, stats | look)
        batch = [draw(expert_rows, half), draw(rows, half - num_model)] + ([imagined(num_model)] if num_model else [])
        metrics = agent.update(*unpack(torch.cat(batch), obs_dim, act_dim), step)  # l. 11, 12
        if step % args.log_every == 0 or step == args.total_updates:
            run.log(step, metrics)
        if args.eval_episodes and (step % args.eval_every == 0 or step == args.total_updates):
            run.log(step, evaluate(task, envs, agent.act, args.seed, args.gamma, run.folder))
    run.finish()


if __name__ == "__main__":
    plumbing.run_script(main, Args, __doc__)
