"""Generates data for hopper, halfcheetah, walker2d and ant by D4RL's recipe: trains SAC and records its policies.

Paper: Haarnoja et al. 2018, arXiv:1812.05905 (SAC with learnt temperature).  Recipe: D4RL (Fu et al. 2020, 2004.07219).

  random          uniform actions
  medium          a policy with about a third of the expert's return, actions sampled
  medium-replay   all transitions of the SAC run until its policy was "medium"
  expert          the policy at the end of the SAC run, actions sampled
  medium-expert   medium, then expert
  jump, angle     all transitions of the SAC run (halfcheetah, ant) with the reward of MOPO's task (envs/relabelled.py);
                  jump's agent is itself trained on another reward, to run no faster than 3 m/s

    python datasets/mujoco.py --env hopper --kinds medium-replay                 # about half an hour on 2 cores
    python datasets/mujoco.py --env halfcheetah                                  # the first five; a night
    python algorithms/romi_cql.py --env hopper-medium --dataset generated

Each dataset is written as HDF5 in D4RL layout, with a .json of recipe, versions, seed, returns and sha256, and as a
Minari dataset `rewind/<env>/<kind>-v0`. Repeating the command resumes an interrupted run and skips finished datasets.
Differences from D4RL:
  1. Gymnasium's v4 robots on today's MuJoCo (hopper and ant with corrected contact margins, utils.make_env), not
     mujoco-py. Scores on these data are therefore reported as `generated` or `bundled`, never as D4RL's.
  2. "medium" is the first evaluation (10 episodes, deterministic actions) whose mean return lies in --medium-band; D4RL
     says only "about a third of expert".
  3. Only complete episodes are kept, so no file ends in a fragment.
"""

import hashlib
import io
import itertools
import json
import sys
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

# This file has the name of a package it imports: search the project's root, not this folder.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import gymnasium
import h5py
import mujoco
import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import nn
from tqdm import tqdm

import plumbing
import utils
from envs.relabelled import Relabelled, relabelled_reward
from plumbing import Positive, Seed, Share, UserError
from utils import GENERATED, REFERENCE, RELABELLED, make_env

Kind = Literal["random", "medium", "medium-replay", "expert", "medium-expert", "jump", "angle"]
D4RLS = ("random", "medium", "medium-replay", "expert", "medium-expert")


@dataclass
class Args:
    # --- experiment ---
    env: Literal["hopper", "halfcheetah", "walker2d", "ant"] = "hopper"  # robot: Gymnasium's v4
    kinds: Annotated[tuple[Kind, ...], Field(min_length=1)] = D4RLS  # datasets: D4RL's five, jump or angle
    seed: Seed = 0
    out: Path = GENERATED  # $REWIND_DATASETS or ~/.rewind/datasets; SAC's checkpoints are kept below it
    minari: bool = True  # also write Minari datasets
    infos: bool = True  # also record qpos and qvel, as D4RL does
    num_threads: PositiveInt = 1  # a second core does not speed up such small networks; run another seed on it

    # --- data ---
    steps: PositiveInt = 1_000_000  # transitions of random, medium and expert
    medium_band: tuple[float, float] = (0.406, 0.498)  # of the normalised return; 0: D4RL's random policy, 1: expert
    min_replay: NonNegativeInt = 0  # earliest environment step at which a policy can be medium

    # --- SAC ---
    total_steps: PositiveInt = 1_000_000  # environment steps; reached only for expert, jump or angle
    updates_per_step: Positive = 1.0  # below 1 the policy becomes medium later, and the replay is larger
    random_steps: NonNegativeInt = 5_000  # uniform actions at the start
    batch_size: PositiveInt = 256
    gamma: Share = 0.99
    tau: Share = 0.005
    lr: Positive = 3e-4  # for policy, Q functions and temperature
    hidden: PositiveInt = 256  # width of the two hidden layers
    eval_every: PositiveInt = 5_000  # environment steps
    eval_episodes: PositiveInt = 10
    checkpoint_every: PositiveInt = 20_000  # environment steps; written at the next episode end
    keep_policies: bool = False  # also keep every checkpoint's policy from now on, as policy_<step>.pt


# --- networks ---


class Policy(nn.Module):
    """Tanh-squashed Gaussian; log standard deviation clamped to [-20, 2]."""

    def __init__(self, obs_dim, act_dim, hidden):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(obs_dim, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
        self.head = nn.Linear(hidden, 2 * act_dim)

    def forward(self, obs):
        """obs (B, O) -> sampled action (B, A), its log-density (B,), the mean action (B, A)"""
        mean, log_std = self.head(self.body(obs)).chunk(2, -1)
        log_std = log_std.clamp(-20, 2)
        noise = torch.randn_like(mean)
        pre_tanh = mean + log_std.exp() * noise
        # log|d tanh(u)/du| = 2 (log 2 - u - softplus(-2u)), finite for every u
        log_prob = -0.5 * noise.square() - log_std - 0.5 * np.log(2 * np.pi)
        log_prob = log_prob - 2 * (np.log(2) - pre_tanh - F.softplus(-2 * pre_tanh))
        return pre_tanh.tanh(), log_prob.sum(-1), mean.tanh()


class DoubleQ(nn.Module):
    """Both Q functions, with a leading axis of 2 in their weights."""

    def __init__(self, obs_dim, act_dim, hidden):
        super().__init__()
        sizes = [obs_dim + act_dim, hidden, hidden, 1]
        layers = [(n, m, n**-0.5) for n, m in itertools.pairwise(sizes)]
        self.weight = nn.ParameterList(torch.empty(2, n, m).uniform_(-k, k) for n, m, k in layers)
        self.bias = nn.ParameterList(torch.empty(2, 1, m).uniform_(-k, k) for n, m, k in layers)

    def forward(self, obs, act):
        """obs (B, O), act (B, A) -> (2, B)"""
        x = torch.cat([obs, act], -1).expand(2, -1, -1)
        for i, (w, b) in enumerate(zip(self.weight, self.bias, strict=True)):
            x = torch.baddbmm(b, x, w)
            x = x.relu() if i < 2 else x
        return x.squeeze(-1)


def descend(opt, loss):
    """One gradient step on the optimizer's parameters; no other parameter gets a gradient."""
    opt.zero_grad()
    loss.backward(inputs=[p for group in opt.param_groups for p in group["params"]])
    opt.step()


# --- learner ---


class SAC:
    MODULES = ("policy", "qf", "target_qf", "policy_opt", "qf_opt", "alpha_opt")

    def __init__(self, obs_dim, act_dim, args):
        self.gamma, self.tau, self.target_entropy = args.gamma, args.tau, -float(act_dim)
        self.policy = Policy(obs_dim, act_dim, args.hidden)
        self.qf = DoubleQ(obs_dim, act_dim, args.hidden)
        self.target_qf = DoubleQ(obs_dim, act_dim, args.hidden)
        self.target_qf.load_state_dict(self.qf.state_dict())
        self.log_alpha = nn.Parameter(torch.zeros(()))
        self.policy_opt = torch.optim.Adam(self.policy.parameters(), lr=args.lr, fused=True)
        self.qf_opt = torch.optim.Adam(self.qf.parameters(), lr=args.lr, fused=True)
        self.alpha_opt = torch.optim.Adam([self.log_alpha], lr=args.lr, fused=True)

    def qf_loss(self, obs, act, rew, next_obs, terminated):
        with torch.no_grad():
            next_act, next_log_prob, _ = self.policy(next_obs)
            next_q = self.target_qf(next_obs, next_act).amin(0) - self.log_alpha.exp() * next_log_prob
            target_q = rew + self.gamma * (1 - terminated) * next_q  # time limits bootstrap
        return (self.qf(obs, act) - target_q).square().mean(1).sum()

    def update(self, obs, act, rew, next_obs, terminated):
        descend(self.qf_opt, self.qf_loss(obs, act, rew, next_obs, terminated))
        new_act, log_prob, _ = self.policy(obs)
        alpha = self.log_alpha.detach().exp()
        descend(self.policy_opt, (alpha * log_prob - self.qf(obs, new_act).amin(0)).mean())
        descend(self.alpha_opt, -self.log_alpha * (log_prob.detach().mean() + self.target_entropy))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.target_qf.parameters()), list(self.qf.parameters()), self.tau)

    def state_dict(self):
        parts = {name: getattr(self, name).state_dict() for name in self.MODULES}
        return parts | {"log_alpha": self.log_alpha.detach()}

    def load_state_dict(self, state):
        for name in self.MODULES:
            getattr(self, name).load_state_dict(state[name])
        self.log_alpha.data.copy_(state["log_alpha"])


# --- datasets ---

FLAGS = ("terminals", "timeouts")
KEYS = ("observations", "actions", "rewards", "next_observations", *FLAGS, "infos/qpos", "infos/qvel")


def as_arrays(rows):
    """Arrays from rows with values in the order of KEYS."""
    columns = zip(KEYS, zip(*rows, strict=True), strict=True)
    return {k: np.asarray(column, bool if k in FLAGS else np.float32) for k, column in columns}


def collect(env_name, act_fn, steps, seed, desc, num_envs=8):
    """At least `steps` transitions of whole episodes; act_fn: obs (B, O) -> act (B, A), both NumPy."""
    rows, seeds = [], itertools.count(seed + 1)

    def begin(env):
        return [env, env.reset(seed=next(seeds))[0], []]

    running = [begin(env) for env in [make_env(env_name) for _ in range(num_envs)]]
    with plumbing.progress(steps, desc, "step") as bar:
        while len(rows) < steps:
            acts = act_fn(np.stack([obs for _, obs, _ in running]).astype(np.float32))
            for slot, act in zip(running, acts, strict=True):
                env, obs, episode = slot
                qpos, qvel = env.unwrapped.data.qpos.copy(), env.unwrapped.data.qvel.copy()
                slot[1], rew, terminated, truncated, _ = env.step(act)
                episode.append((obs, act, rew, slot[1], terminated, truncated and not terminated, qpos, qvel))
                if terminated or truncated:
                    rows += episode
                    bar.update(len(episode))
                    slot[:] = begin(env)
    return as_arrays(rows)


def episode_returns(data):
    """(E,) each: returns and lengths"""
    ends = np.flatnonzero(data["terminals"] | data["timeouts"]) + 1
    return np.add.reduceat(data["rewards"].astype(np.float64), np.r_[0, ends[:-1]]), np.diff(np.r_[0, ends])


# Flags that do not affect the data.
IDLE = {"kinds", "minari", "checkpoint_every", "keep_policies", "out", "num_threads"}


def as_json(args):
    return json.loads(json.dumps(asdict(args), default=str))


def other_settings(path, kind, args):
    """Flags of the existing dataset that affect data of its kind and differ from `args`."""
    mine, theirs = as_json(args), plumbing.read_json(path.with_suffix(".json")).get("args", {})
    idle = set(IDLE)
    if kind in ("medium-replay", *RELABELLED):
        idle |= {"steps"}
    if kind in ("medium", "medium-replay"):
        idle |= {"total_steps"}
    if kind in ("expert", *RELABELLED):
        idle |= {"medium_band", "min_replay"}
    matters = ("seed", "steps", "infos") if kind == "random" else [k for k in mine if k not in idle]
    return [f"--{k.replace('_', '-')} {theirs[k]}" for k in matters if k in theirs and theirs[k] != mine[k]]


def write(path, data, facts, args):
    """Write HDF5 in D4RL layout, and the .json beside it."""
    returns, lengths = episode_returns(data)
    facts = facts | {
        "environment": make_env(args.env).spec.id,
        "margins": "all geom margins halved (utils.make_env)" if args.env in ("hopper", "ant") else "as shipped",
        "transitions": len(data["rewards"]),
        "episodes": len(returns),
        "length_mean": float(lengths.mean()),
        "terminals": int(data["terminals"].sum()),
        "timeouts": int(data["timeouts"].sum()),
        "versions": plumbing.versions(gymnasium, mujoco, np, torch, h5py),
        "date": date.today().isoformat(),
        "args": {k: v for k, v in as_json(args).items() if k not in ("out", "num_threads")},
    }
    facts |= {f"return_{k}": float(getattr(returns, k)()) for k in ("mean", "std", "min", "max")}
    if args.minari and facts["kind"] not in RELABELLED:  # Minari cannot store our wrapper of their environment
        write_minari(f"rewind/{args.env}/{facts['kind']}-v0", data, facts, args)
    arrays = {k: v for k, v in data.items() if args.infos or not k.startswith("infos/")}
    plumbing.write_hdf5(path, arrays, facts, level=9, attributes=("environment", "margins", "recipe", "seed"))
    mean, std = facts["return_mean"], facts["return_std"]
    tqdm.write(
        f"{path.name}: {len(data['rewards'])} transitions, {len(returns)} episodes, return {mean:.1f} +- {std:.1f}"
    )


def write_minari(dataset_id, data, facts, args):
    facts = {k: facts[k] for k in ("recipe", "margins", "seed", "versions")}
    env, script = make_env(args.env).spec.id, "datasets/mujoco.py"
    utils.write_minari(dataset_id, data, env, REFERENCE[args.env], "SAC", script, facts)


# --- the SAC run ---


@dataclass
class Run:
    """State to save besides networks, replay and random states."""

    step: int = 0
    episode: int = 0
    updates: int = 0
    evals: list = field(default_factory=list)  # [step, mean, standard deviation of the return]
    medium_at: int = 0
    medium_return: float = 0.0


def write_checkpoint(path, state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    plumbing.write_file(path, buffer.getbuffer())


def train(args, folder):
    """Train SAC until its policy is medium, or to the end if needed; returns agent, run, replay, medium policy."""
    to_the_end = bool({"expert", "medium-expert", *RELABELLED} & set(args.kinds))
    env, eval_envs = make_env(args.env), [make_env(args.env) for _ in range(args.eval_episodes)]
    if "jump" in args.kinds:
        env, eval_envs = Relabelled(env, "run"), [Relabelled(e, "run") for e in eval_envs]
    o, a = env.observation_space.shape[0], env.action_space.shape[0]
    agent, run, medium_policy = SAC(o, a, args), Run(), None
    widths = ((o,), (a,), (), (o,), (), (), (env.unwrapped.model.nq,), (env.unwrapped.model.nv,))  # of KEYS
    replay = [torch.zeros(args.total_steps + 1000, *w) for w in widths]

    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        saved = plumbing.read_checkpoint(checkpoint, ("agent", "run", "replay", "medium_policy", "rng"))
        agent.load_state_dict(saved["agent"])
        run, medium_policy = Run(**saved["run"]), saved["medium_policy"]
        for whole, part in zip(replay, saved["replay"], strict=True):
            whole[: run.step] = part
        torch.set_rng_state(saved["rng"])
        tqdm.write(f"resumed at step {run.step}")

    def save():
        folder.mkdir(parents=True, exist_ok=True)
        if args.keep_policies:
            write_checkpoint(folder / f"policy_{run.step}.pt", {"agent": {"policy": agent.policy.state_dict()}})
        state = {"agent": agent.state_dict(), "run": asdict(run), "medium_policy": medium_policy}
        state |= {"replay": [x[: run.step].clone() for x in replay], "rng": torch.get_rng_state()}
        write_checkpoint(checkpoint, state)

    saved_at, evaluated_at = run.step, run.evals[-1][0] if run.evals else 0
    low, high = REFERENCE[args.env]
    bar = plumbing.progress(args.total_steps, f"SAC {args.env} seed {args.seed}", "step", run.step)
    # Evaluate and save between episodes: no simulator state to save, and the replay holds whole episodes.
    while run.step < args.total_steps and (to_the_end or not run.medium_at):
        run.episode += 1
        obs, _ = env.reset(seed=args.seed * 1_000_000 + run.episode)
        ended, data = False, env.unwrapped.data
        while not ended:
            qpos, qvel = data.qpos.copy(), data.qvel.copy()
            if run.step < args.random_steps:
                act = torch.rand(a) * 2 - 1
            else:
                with torch.no_grad():
                    act = agent.policy(torch.as_tensor(obs, dtype=torch.float32)[None])[0][0]
            next_obs, rew, terminated, truncated, _ = env.step(act.numpy())
            ended = terminated or truncated
            row = (obs, act, rew, next_obs, terminated, truncated and not terminated, qpos, qvel)
            for whole, value in zip(replay, row, strict=True):
                whole[run.step] = torch.as_tensor(value)
            run.step, obs = run.step + 1, next_obs
            while run.updates < (run.step - args.random_steps) * args.updates_per_step:
                idx = torch.randint(run.step, (args.batch_size,))
                agent.update(*(x[idx] for x in replay[:5]))
                run.updates += 1
        bar.update(run.step - bar.n)
        if run.step // args.eval_every > evaluated_at // args.eval_every and run.step > args.random_steps:
            evaluated_at = run.step
            _, rewards = utils.rollout(eval_envs, lambda obs: agent.policy(obs)[2], args.seed + 100)
            returns = np.array([sum(r) for r in rewards])
            run.evals.append([run.step, float(returns.mean()), float(returns.std())])
            bar.set_postfix(eval=f"{returns.mean():.0f}", updates=run.updates)
            medium = args.medium_band[0] <= (returns.mean() - low) / (high - low) <= args.medium_band[1]
            if medium and not run.medium_at and run.step >= args.min_replay:
                run.medium_at, run.medium_return = run.step, float(returns.mean())
                medium_policy = {k: v.clone() for k, v in agent.policy.state_dict().items()}
                save()
        if run.step // args.checkpoint_every > saved_at // args.checkpoint_every:
            saved_at = run.step
            save()
    bar.close()
    save()
    return agent, run, [x.numpy() for x in replay], medium_policy


def main(args):
    args = plumbing.validate(args)
    if args.total_steps <= args.random_steps:
        why = f"must exceed --random-steps {args.random_steps}, or nothing is learnt"
        raise UserError(f"--total-steps {args.total_steps}: {why}")
    if wrong := [kind for kind in args.kinds if RELABELLED.get(kind, args.env) != args.env]:
        raise UserError(f"--kinds {wrong[0]} is a task of {RELABELLED[wrong[0]]}, not of {args.env}")
    if "jump" in args.kinds and len(args.kinds) > 1:
        raise UserError("--kinds jump: generate it alone, since its agent is trained on another reward")
    plumbing.start(SimpleNamespace(**asdict(args), device="cpu", compile=False))
    torch.manual_seed(args.seed)
    paths = {kind: args.out / f"{args.env}_{kind.replace('-', '_')}.hdf5" for kind in args.kinds}
    todo = [kind for kind in args.kinds if not (paths[kind].exists() and paths[kind].with_suffix(".json").exists())]
    for kind in sorted(set(args.kinds) - set(todo)):
        if other := other_settings(paths[kind], kind, args):
            how = "remove it (and its .json), or use another --out"
            raise UserError(f"{paths[kind]} was made with {', '.join(other)}; {how}")
        print(f"{paths[kind]} exists")
    if not todo:
        if args.keep_policies:
            print("--keep-policies: nothing is trained, so no policies are kept; use another --out")
        return

    run, facts = None, {"seed": args.seed}
    if set(todo) - {"random"}:
        settings = {k: v for k, v in as_json(args).items() if k not in IDLE | {"steps", "infos"}}
        settings |= {"jump": "jump" in args.kinds}  # these determine the SAC run
        tag = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
        agent, run, replay, medium = train(args, args.out / f"sac-{args.env}-{args.seed}-{tag}")
        if set(todo) & {"medium", "medium-replay", "medium-expert"} and not run.medium_at:
            how = "widen it or change --seed"
            raise UserError(f"no evaluation within --medium-band in {run.step} steps; {how}; evaluations: {run.evals}")
        facts |= {"sac_steps": run.step, "sac_updates": run.updates, "evaluations": run.evals}
        if run.medium_at:
            facts |= {"medium_at": run.medium_at, "medium_eval_return": run.medium_return}

    def collected(kind):
        """Data of uniform actions or of a frozen policy, whatever other kinds are requested."""
        torch.manual_seed(args.seed + 1)
        rng, env = np.random.default_rng(args.seed + 1), make_env(args.env)
        widths = env.observation_space.shape + env.action_space.shape
        policy = Policy(*widths, args.hidden)
        if kind != "random":
            policy.load_state_dict(medium if kind == "medium" else agent.policy.state_dict())

        @torch.no_grad()
        def act(obs):
            if kind == "random":
                return rng.uniform(-1, 1, (len(obs), widths[1])).astype(np.float32)
            return policy(torch.from_numpy(obs))[0].numpy()

        return collect(args.env, act, args.steps, (args.seed + 1) * 10_000_000, kind)

    made = {}  # kind -> data that medium-expert may need
    for kind in sorted(todo, key=lambda kind: kind == "medium-expert"):  # last, when its halves may exist
        if kind == "medium-expert":
            halves = [made[half] if half in made else collected(half) for half in ("medium", "expert")]
            data, recipe = {k: np.concatenate([half[k] for half in halves]) for k in KEYS}, "medium, then expert"
        elif kind in ("random", "medium", "expert"):
            data = made[kind] = collected(kind)
            at = 0 if run is None else run.medium_at if kind == "medium" else run.step
            recipe = f"frozen SAC policy of step {at}, actions sampled, whole episodes"
            recipe = "uniform actions" if kind == "random" else recipe
        else:
            n = run.medium_at if kind == "medium-replay" else run.step
            data = {k: x[:n].astype(bool) if k in FLAGS else x[:n] for k, x in zip(KEYS, replay, strict=True)}
            means = [mean for at, mean, _ in run.evals if kind != "medium-replay" or at == n]
            how = f"{args.updates_per_step:g} updates per environment step, {args.random_steps} uniform steps first"
            ret = f"{means[-1]:.1f}" if means else "not measured"
            recipe = f"replay buffer of SAC ({how}) up to step {n}, where the deterministic policy's evaluation return "
            recipe += f"was {ret}"
            if kind in RELABELLED:
                rewards = relabelled_reward(kind, data["actions"], data["next_observations"])
                data["rewards"] = rewards.astype(np.float32)
                recipe += " under its own reward; rewards relabelled afterwards (envs.relabelled)"
        write(paths[kind], data, facts | {"kind": kind, "recipe": recipe}, args)


if __name__ == "__main__":
    plumbing.run_script(main, Args, __doc__)
