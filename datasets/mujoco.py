"""D4RL-recipe data for hopper, halfcheetah, walker2d and ant, made on this machine: SAC from scratch, then five data sets.

Paper: Haarnoja et al. 2018, arXiv:1812.05905 (SAC with learnt temperature).  Recipe: D4RL (Fu et al. 2020, arXiv:2004.07219).

  random          uniform actions
  medium          one frozen policy at about a third of expert return, actions sampled
  medium-replay   everything the SAC run saw until its policy was "medium"
  expert          the policy at the end of the SAC run, actions sampled
  medium-expert   medium, then expert
  jump, angle     everything the SAC run saw (halfcheetah, ant), with the reward of MOPO's tasks (utils.relabelled_reward); the
                  agent of jump is itself trained on another reward, to run no faster than 3 m/s

    python datasets/mujoco.py --env hopper --kinds medium-replay                 # about half an hour on 2 cores
    python datasets/mujoco.py --env halfcheetah                                  # all five; a night
    python algorithms/romi_cql.py --env hopper-medium --dataset generated

Each data set is written as HDF5 in D4RL layout (with a .json beside it that holds recipe, versions, seed, returns and sha256)
and as a Minari data set `rewind/<env>/<kind>-v0`. The same command again resumes a run that was cut and skips what is done.

Differences from D4RL:
  1. Gymnasium's v4 robots on today's MuJoCo (hopper and ant with corrected contact margins, utils.make_env), not mujoco-py.
     Scores on this data are therefore reported as `generated` or `bundled`, never as D4RL's.
  2. "medium" is the first evaluation (10 episodes, deterministic actions) whose mean return lies in --medium-band; D4RL says
     only "about a third of expert".
  3. Only complete episodes are kept everywhere, so no file ends in a fragment.
"""

import ctypes
import hashlib
import json
import os
import platform
import sys
from collections import deque
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Literal

# This file has the name of a package it needs: its own folder must not be searched, the project's root must.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import gymnasium
import h5py
import mujoco
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import nn
from tqdm import tqdm

import utils
from utils import GENERATED, REFERENCE, RELABELLED, Relabelled, UserError, evaluate, file_sha256, make_env, relabelled_reward

Kind = Literal["random", "medium", "medium-replay", "expert", "medium-expert", "jump", "angle"]


@dataclass
class Args:
    # --- experiment ---
    env: Literal["hopper", "halfcheetah", "walker2d", "ant"] = "hopper"
    """robot; the environment is Gymnasium's v4"""
    kinds: tuple[Kind, ...] = ("random", "medium", "medium-replay", "expert", "medium-expert")
    """data sets to make"""
    seed: int = 0
    out: Path = GENERATED
    """folder for the HDF5 files; the SAC run is kept below it"""
    minari: bool = True
    """also write Minari data sets"""
    infos: bool = True
    """also record qpos and qvel, as D4RL does"""
    num_threads: int = 1
    """networks this small gain nothing from a second thread; a second seed on the other core does"""

    # --- data ---
    steps: int = 1_000_000
    """transitions of random, medium and expert"""
    medium_band: tuple[float, float] = (0.406, 0.498)
    """a policy is medium when its evaluation return, normalised with D4RL's reference scores, lies between these"""
    min_replay: int = 0
    """the policy is not called medium before this many environment steps"""

    # --- SAC ---
    total_steps: int = 1_000_000
    """environment steps; reached only when expert, jump or angle is asked for"""
    updates_per_step: float = 1.0
    """gradient updates per environment step; below 1 the policy becomes medium later and the replay is larger"""
    random_steps: int = 5_000
    """uniform actions at the start"""
    batch_size: int = 256
    gamma: float = 0.99
    tau: float = 0.005
    lr: float = 3e-4
    """Adam, policy, Q functions and temperature alike"""
    hidden: int = 256
    """width of the two hidden layers"""
    eval_every: int = 5_000
    """environment steps"""
    eval_episodes: int = 10
    checkpoint_every: int = 20_000
    """environment steps; written at the next episode end"""
    keep_policies: bool = False
    """keep the policy of every checkpoint from now on, as policy_<step>.pt beside it (for armor.py --reference)"""


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
    """Both Q functions in one set of weights with a leading axis of 2."""

    def __init__(self, obs_dim, act_dim, hidden):
        super().__init__()
        sizes = [obs_dim + act_dim, hidden, hidden, 1]
        bound = [n**-0.5 for n in sizes]
        self.weight = nn.ParameterList(torch.empty(2, n, m).uniform_(-k, k) for n, m, k in zip(sizes, sizes[1:], bound, strict=False))
        self.bias = nn.ParameterList(torch.empty(2, 1, m).uniform_(-k, k) for m, k in zip(sizes[1:], bound, strict=False))

    def forward(self, obs, act):
        """obs (B, O), act (B, A) -> (2, B)"""
        x = torch.cat([obs, act], -1).expand(2, -1, -1)
        for i, (w, b) in enumerate(zip(self.weight, self.bias, strict=True)):
            x = torch.baddbmm(b, x, w)
            x = x.relu() if i < 2 else x
        return x.squeeze(-1)


# --- learner ---


class SAC:
    def __init__(self, obs_dim, act_dim, args):
        self.args = args
        self.policy = Policy(obs_dim, act_dim, args.hidden)
        self.qf = DoubleQ(obs_dim, act_dim, args.hidden)
        self.target_qf = DoubleQ(obs_dim, act_dim, args.hidden)
        self.target_qf.load_state_dict(self.qf.state_dict())
        self.target_qf.requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.zeros(()))
        self.target_entropy = -float(act_dim)
        self.policy_opt = torch.optim.Adam(self.policy.parameters(), lr=args.lr, fused=True)
        self.qf_opt = torch.optim.Adam(self.qf.parameters(), lr=args.lr, fused=True)
        self.alpha_opt = torch.optim.Adam([self.log_alpha], lr=args.lr, fused=True)

    def update(self, obs, act, rew, next_obs, terminated):
        alpha = self.log_alpha.detach().exp()
        with torch.no_grad():
            next_act, next_log_prob, _ = self.policy(next_obs)
            next_q = self.target_qf(next_obs, next_act).amin(0) - alpha * next_log_prob
            target_q = rew + self.args.gamma * (1 - terminated) * next_q  # time limits do bootstrap
        qf_loss = (self.qf(obs, act) - target_q).square().mean(1).sum()
        self.qf_opt.zero_grad()
        qf_loss.backward()
        self.qf_opt.step()

        new_act, log_prob, _ = self.policy(obs)
        self.qf.requires_grad_(False)
        policy_loss = (alpha * log_prob - self.qf(obs, new_act).amin(0)).mean()
        self.policy_opt.zero_grad()
        policy_loss.backward()
        self.policy_opt.step()
        self.qf.requires_grad_(True)

        alpha_loss = -self.log_alpha * (log_prob.detach().mean() + self.target_entropy)
        self.alpha_opt.zero_grad()
        alpha_loss.backward()
        self.alpha_opt.step()
        with torch.no_grad():  # or the targets would join the graph of the online networks, which then grows for ever
            torch._foreach_lerp_(list(self.target_qf.parameters()), list(self.qf.parameters()), self.args.tau)

    MODULES = ("policy", "qf", "target_qf", "policy_opt", "qf_opt", "alpha_opt")

    def state_dict(self):
        return {name: getattr(self, name).state_dict() for name in self.MODULES} | {"log_alpha": self.log_alpha.detach()}

    def load_state_dict(self, state):
        for name in self.MODULES:
            getattr(self, name).load_state_dict(state[name])
        self.log_alpha.data.copy_(state["log_alpha"])


# --- recording ---


class Recorder:
    """Grows flat arrays of transitions; episodes are whole because callers add whole episodes."""

    KEYS = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts", "infos/qpos", "infos/qvel")

    def __init__(self):
        self.rows = {k: [] for k in self.KEYS}

    def __len__(self):
        return len(self.rows["rewards"])

    def add(self, *values):
        for k, v in zip(self.KEYS, values, strict=True):
            self.rows[k].append(v)

    def extend(self, other):
        for k in self.KEYS:
            self.rows[k].extend(other.rows[k])

    def arrays(self):
        flags = ("terminals", "timeouts")
        return {k: np.asarray(v, bool if k in flags else np.float32) for k, v in self.rows.items()}


def collect(env_name, act_fn, steps, seed, desc, num_envs=8):
    """At least `steps` transitions of whole episodes; act_fn: obs (B, O) -> act (B, A), both NumPy."""
    data, envs = Recorder(), [make_env(env_name) for _ in range(num_envs)]
    episode, running = 0, []

    def begin(env):
        nonlocal episode
        episode += 1
        return [env, env.reset(seed=seed + episode)[0], Recorder()]

    running = [begin(env) for env in envs]
    with tqdm(total=steps, desc=desc, unit="step", mininterval=1) as bar:
        while len(data) < steps:
            acts = act_fn(np.stack([obs for _, obs, _ in running]).astype(np.float32))
            for slot, act in zip(running, acts, strict=True):
                env, obs, rows = slot
                qpos, qvel = env.unwrapped.data.qpos.copy(), env.unwrapped.data.qvel.copy()
                slot[1], rew, terminated, truncated, _ = env.step(act)
                rows.add(obs, act, rew, slot[1], terminated, truncated and not terminated, qpos, qvel)
                if terminated or truncated:
                    data.extend(rows)
                    bar.update(len(rows))
                    slot[:] = begin(env)
    return data.arrays()


def episode_returns(data):
    ends = np.flatnonzero(data["terminals"] | data["timeouts"]) + 1
    return np.add.reduceat(data["rewards"].astype(np.float64), np.r_[0, ends[:-1]]), np.diff(np.r_[0, ends])


def other_settings(path, kind, args):
    """The settings of a data set that is there, as flags, where they are not those of `args` and matter to this kind."""
    idle = {"steps": ("medium-replay", *RELABELLED), "total_steps": ("medium", "medium-replay")}
    idle |= dict.fromkeys(("medium_band", "min_replay"), ("expert", *RELABELLED))
    theirs = json.loads(path.with_suffix(".json").read_text())["args"]
    mine = json.loads(json.dumps({k: str(v) if isinstance(v, Path) else v for k, v in asdict(args).items()}))
    idle |= dict.fromkeys(("kinds", "minari", "checkpoint_every", "keep_policies"), (kind,))
    matters = [k for k in mine if k in theirs and kind not in idle.get(k, ())]
    matters = [k for k in matters if kind != "random" or k in ("seed", "steps", "infos")]
    return [f"--{k.replace('_', '-')} {theirs[k]}" for k in matters if theirs[k] != mine[k]]


def write(path, data, meta, args):
    """HDF5 in D4RL layout, and the sheet of facts beside it; complete under its name or not there at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    returns, lengths = episode_returns(data)
    versions = {m.__name__: m.__version__ for m in (gymnasium, mujoco, np, torch, h5py)} | {"python": platform.python_version()}
    meta = meta | {
        "environment": make_env(args.env).spec.id,
        "margins": "all geom margins halved (utils.make_env)" if args.env in ("hopper", "ant") else "as shipped",
        "transitions": len(data["rewards"]),
        "episodes": len(returns),
        "return_mean": float(returns.mean()),
        "return_std": float(returns.std()),
        "return_min": float(returns.min()),
        "return_max": float(returns.max()),
        "length_mean": float(lengths.mean()),
        "terminals": int(data["terminals"].sum()),
        "timeouts": int(data["timeouts"].sum()),
        "versions": versions,
        "date": date.today().isoformat(),
        "args": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(args).items() if k not in ("out", "num_threads")},
    }
    part = path.with_suffix(".part")
    with h5py.File(part, "w") as f:
        for k, v in data.items():
            if args.infos or not k.startswith("infos/"):
                f.create_dataset(k, data=v, compression="gzip", compression_opts=9, shuffle=True)
        for k in ("environment", "margins", "recipe", "seed"):
            f.attrs[k] = meta[k]
    os.replace(part, path)
    meta["bytes"], meta["sha256"] = path.stat().st_size, file_sha256(path)
    if args.minari and meta["kind"] not in RELABELLED:  # whose environment is a wrapper of ours, which Minari cannot store
        write_minari(f"rewind/{args.env}/{meta['kind']}-v0", data, meta, args)
    part.write_text(json.dumps(meta, indent=1) + "\n")
    os.replace(part, path.with_suffix(".json"))  # last and whole, because its presence means "done"
    tqdm.write(
        f"{path.name}: {meta['transitions']} transitions, {len(returns)} episodes, return {returns.mean():.1f} +- {returns.std():.1f}"
    )


def write_minari(dataset_id, data, meta, args):
    facts = {k: meta[k] for k in ("recipe", "margins", "seed", "versions")}
    utils.write_minari(dataset_id, data, make_env(args.env).spec.id, REFERENCE[args.env], "SAC", "datasets/mujoco.py", facts)


# --- the SAC run ---


@dataclass
class Run:
    """What has to survive a kill beside the networks."""

    step: int = 0
    episode: int = 0
    updates: int = 0
    evals: list = field(default_factory=list)
    medium_at: int = 0
    medium_return: float = 0.0


def train(args, folder):
    """SAC until its policy is medium, or to the end if what is asked for needs it. Returns agent, run, replay, medium policy."""
    to_the_end = bool({"expert", "medium-expert", *RELABELLED} & set(args.kinds))
    env, eval_envs = make_env(args.env), [make_env(args.env) for _ in range(args.eval_episodes)]
    if "jump" in args.kinds:
        env, eval_envs = Relabelled(env, "run"), [Relabelled(e, "run") for e in eval_envs]
    o, a = env.observation_space.shape[0], env.action_space.shape[0]
    agent, run, medium_policy = SAC(o, a, args), Run(), None
    names = ("obs", "act", "rew", "next_obs", "terminated", "truncated", "qpos", "qvel")
    widths = ((o,), (a,), (), (o,), (), (), (env.unwrapped.model.nq,), (env.unwrapped.model.nv,))
    replay = [torch.zeros(args.total_steps + 1000, *w) for w in widths]
    recent = deque(maxlen=20)

    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        agent.load_state_dict(saved["agent"])
        run, medium_policy = Run(**saved["run"]), saved["medium_policy"]
        for whole, part in zip(replay, saved["replay"], strict=True):
            whole[: run.step] = part
        torch.set_rng_state(saved["rng"])
        tqdm.write(f"resumed at step {run.step}")

    def save():
        folder.mkdir(parents=True, exist_ok=True)
        part = checkpoint.with_suffix(".part")
        if args.keep_policies:
            torch.save({"agent": {"policy": agent.policy.state_dict()}}, part)
            os.replace(part, folder / f"policy_{run.step}.pt")
        torch.save(
            {
                "agent": agent.state_dict(),
                "run": asdict(run),
                "medium_policy": medium_policy,
                "replay": [x[: run.step].clone() for x in replay],
                "rng": torch.get_rng_state(),
            },
            part,
        )
        os.replace(part, checkpoint)

    def act_deterministic(obs):
        return agent.policy(torch.as_tensor(obs, dtype=torch.float32))[2]

    saved_at, evaluated_at = run.step, run.evals[-1][0] if run.evals else 0
    low, high = REFERENCE[args.env]
    bar = tqdm(total=args.total_steps, initial=run.step, desc=f"SAC {args.env} seed {args.seed}", unit="step", mininterval=1)
    # Evaluations and checkpoints happen between episodes: no simulator state has to be saved, and the replay is whole episodes.
    while run.step < args.total_steps and (to_the_end or not run.medium_at):
        run.episode += 1
        obs, _ = env.reset(seed=args.seed * 1_000_000 + run.episode)
        ended, episode_return, data = False, 0.0, env.unwrapped.data
        while not ended:
            qpos, qvel = data.qpos.copy(), data.qvel.copy()
            if run.step < args.random_steps:
                act = torch.rand(a) * 2 - 1
            else:
                with torch.no_grad():
                    act = agent.policy(torch.as_tensor(obs, dtype=torch.float32)[None])[0][0]
            next_obs, rew, terminated, truncated, _ = env.step(act.numpy())
            ended, episode_return = terminated or truncated, episode_return + rew
            row = (obs, act, rew, next_obs, terminated, truncated and not terminated, qpos, qvel)
            for whole, value in zip(replay, row, strict=True):
                whole[run.step] = torch.as_tensor(value)
            run.step, obs = run.step + 1, next_obs
            if run.step > args.random_steps:
                while run.updates < (run.step - args.random_steps) * args.updates_per_step:
                    idx = torch.randint(run.step, (args.batch_size,))
                    agent.update(*(x[idx] for x in replay[:5]))
                    run.updates += 1
        bar.update(run.step - bar.n)
        recent.append(episode_return)
        if run.step // args.eval_every > evaluated_at // args.eval_every and run.step > args.random_steps:
            evaluated_at = run.step
            returns, _ = evaluate(eval_envs, act_deterministic, seed=args.seed + 100)
            run.evals.append([run.step, float(returns.mean()), float(returns.std())])
            score = (returns.mean() - low) / (high - low)
            bar.set_postfix(eval=f"{returns.mean():.0f}", recent=f"{np.mean(recent):.0f}", updates=run.updates)
            if not run.medium_at and run.step >= args.min_replay and args.medium_band[0] <= score <= args.medium_band[1]:
                run.medium_at, run.medium_return = run.step, float(returns.mean())
                medium_policy = {k: v.clone() for k, v in agent.policy.state_dict().items()}
                save()
        if run.step // args.checkpoint_every > saved_at // args.checkpoint_every:
            saved_at = run.step
            save()
    bar.close()
    save()
    env.close()
    for e in eval_envs:
        e.close()
    return agent, run, [x.numpy() for x in replay], dict(zip(names, widths, strict=True)), medium_policy


def main(args):
    if not args.kinds or args.updates_per_step <= 0 or args.steps < 1:
        raise UserError("--kinds, --updates-per-step and --steps must leave something to do")
    if args.total_steps <= args.random_steps:
        raise UserError(f"--total-steps {args.total_steps}: must exceed --random-steps {args.random_steps}, or nothing is learnt")
    if wrong := [f"{kind} is a task of {RELABELLED[kind]}" for kind in args.kinds if RELABELLED.get(kind, args.env) != args.env]:
        raise UserError(f"--kinds: {', '.join(wrong)}, not of {args.env}")
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.num_threads)
    if platform.libc_ver()[0] == "glibc":  # its self-adjusting thresholds let this run grow by gigabytes; fixed ones do not
        for option, value in ((-3, 32 << 20), (-1, 2**31 - 1), (-2, 64 << 20)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD
            ctypes.CDLL(None).mallopt(option, value)
    if "jump" in args.kinds and len(args.kinds) > 1:
        raise UserError("--kinds jump: make it by itself, its agent is trained on another reward")
    paths = {kind: args.out / f"{args.env}_{kind.replace('-', '_')}.hdf5" for kind in args.kinds}
    todo = [kind for kind in args.kinds if not (paths[kind].exists() and paths[kind].with_suffix(".json").exists())]
    for kind in sorted(set(args.kinds) - set(todo)):
        if other := other_settings(paths[kind], kind, args):
            raise UserError(f"{paths[kind]} was made with {', '.join(other)}; remove it (and its .json), or give another --out")
        print(f"{paths[kind]} is there already")
    if not todo:
        if args.keep_policies:
            print("--keep-policies: nothing is trained, so nothing is kept; give another --out")
        return
    agent = run = replay = medium = None
    if set(todo) - {"random"}:
        settings = asdict(args) | {"out": "", "kinds": ("jump",) if "jump" in args.kinds else ()}
        del settings["keep_policies"]  # decides nothing, so with it a run goes on that was begun without
        tag = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
        agent, run, replay, _, medium = train(args, args.out / f"sac-{args.env}-{args.seed}-{tag}")
        if set(todo) & {"medium", "medium-replay", "medium-expert"} and not run.medium_at:
            raise UserError(f"no evaluation within --medium-band in {run.step} steps; widen it or change --seed; evaluations: {run.evals}")

    def sampled(weights):
        policy = Policy(*(make_env(args.env).observation_space.shape + make_env(args.env).action_space.shape), args.hidden)
        policy.load_state_dict(weights)

        @torch.no_grad()
        def act(obs):
            return policy(torch.from_numpy(obs))[0].numpy()

        return act

    made = {}
    for kind in sorted(todo, key=("random", "medium-replay", "jump", "angle", "medium", "expert", "medium-expert").index):
        torch.manual_seed(args.seed + 1)  # so that a data set does not depend on which others were asked for
        rng, act_dim = np.random.default_rng(args.seed + 1), make_env(args.env).action_space.shape[0]
        meta = {"kind": kind, "seed": args.seed}
        if run is not None:
            meta |= {"sac_steps": run.step, "sac_updates": run.updates, "evaluations": run.evals}
            if run.medium_at:
                meta |= {"medium_at": run.medium_at, "medium_eval_return": run.medium_return}
        seed0 = (args.seed + 1) * 10_000_000
        if kind == "random":
            data = collect(args.env, lambda obs: rng.uniform(-1, 1, (len(obs), act_dim)).astype(np.float32), args.steps, seed0, kind)
            meta["recipe"] = "uniform actions"
        elif kind in ("medium-replay", *RELABELLED):
            n = run.medium_at if kind == "medium-replay" else run.step
            data = {k: x[:n].astype(bool) if x.ndim == 1 and k != "rewards" else x[:n] for k, x in zip(Recorder.KEYS, replay, strict=True)}
            ret = run.medium_return if kind == "medium-replay" else run.evals[-1][1] if run.evals else None
            meta["recipe"] = (
                f"replay buffer of SAC ({args.updates_per_step:g} updates per environment step, {args.random_steps} uniform steps first) "
                f"up to step {n}, where the deterministic policy's evaluation return was {'not measured' if ret is None else f'{ret:.1f}'}"
            )
            if kind in RELABELLED:
                data["rewards"] = relabelled_reward(kind, data["actions"], data["next_observations"]).astype(np.float32)
                meta["recipe"] += " under its own reward; rewards relabelled afterwards (utils.relabelled_reward)"
        elif kind in ("medium", "expert"):
            data = collect(args.env, sampled(medium if kind == "medium" else agent.policy.state_dict()), args.steps, seed0, kind)
            at = run.medium_at if kind == "medium" else run.step
            meta["recipe"] = f"frozen SAC policy of step {at}, actions sampled, whole episodes"
        else:
            halves = []
            for half in ("medium", "expert"):
                if half not in made:
                    weights = medium if half == "medium" else agent.policy.state_dict()
                    torch.manual_seed(args.seed + 1)
                    made[half] = collect(args.env, sampled(weights), args.steps, seed0, half)
                halves.append(made[half])
            data = {k: np.concatenate([h[k] for h in halves]) for k in Recorder.KEYS}
            meta["recipe"] = "medium, then expert"
        made[kind] = data
        write(paths[kind], data, meta, args)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__.split("\n")[0]))
    except UserError as e:
        sys.exit(e.report())
    except KeyboardInterrupt:
        tqdm.write("interrupted; the same command goes on from the last checkpoint (every --checkpoint-every steps)", file=sys.stderr)
        sys.exit(130)
