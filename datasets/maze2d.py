"""Generates D4RL's maze2d data: a planner drives the ball to random targets in one endless trajectory.

Recipe: Farama-Foundation/D4RL, scripts/generation/generate_maze2d_datasets.py, d4rl/pointmaze/waypoint_controller.py.

  1. The target is a free cell, sampled uniformly.
  2. Value iteration gives a path of cells to it; every waypoint but the last is shifted by up to 0.2.
  3. action = clip(10 (waypoint - position) - velocity) + N(0, 0.5^2), clipped again.
  4. Within 0.1 of the target cell a new target is sampled.

    python datasets/maze2d.py --maze umaze               # 1 000 000 steps, both rewards, about a minute
    python datasets/maze2d.py --maze umaze --expert      # demonstrations: episodes to the task's goal, no noise
    python datasets/maze2d.py --maze umaze --minari      # also as a Minari dataset: --env rewind/maze2d/umaze-v0
    python algorithms/romi_bcq.py --env maze2d-umaze --dataset generated

Output: HDF5 in D4RL layout, with sparse and dense reward, each with a .json of recipe, versions and sha256. --minari
also writes Minari datasets rewind/maze2d/<maze>[-dense][-expert]-v0, one episode per segment. As in D4RL's files,
`timeouts` mark rows at which a target was reached, though the motion continues, and the reward is that of the row's own
position; the environment rewards the position after the step (--reward-timing next writes that).

D4RL's script continues with a stale observation after each reached target: the first row of a segment repeats the
previous observation, its action is computed from it, and its transition spans two steps (1.1 % of umaze's rows). The
papers' data have these rows, so this script makes them, too; --repaired data, named ..._repaired, do not have them.

Differences from D4RL's script: the planner starts from the nearest free cell, which is the rounded position wherever
that is free; the second condition for reaching a waypoint, a step shorter than 0.1, always holds and is omitted;
infos/goal is the target cell without D4RL's shift of up to 0.1, which does not affect the motion; infos/qpos and
infos/qvel, the two halves of an observation, are omitted.
"""

import functools
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project's root, not this folder

import h5py
import mujoco
import numpy as np
from pydantic import PositiveInt
from tqdm import tqdm

import plumbing
from envs.maze2d import MAX_STEPS, Maze2d, free_cells, goal_cell
from plumbing import NonNegative, Seed, UserError
from utils import GENERATED, REFERENCE, write_minari

STEPS = {"umaze": 1_000_000, "medium": 2_000_000, "large": 4_000_000}


@dataclass
class Args:
    maze: Literal["umaze", "medium", "large"] = "umaze"
    steps: PositiveInt | None = None  # None: as in D4RL, 1, 2 or 4 million; with --expert 100 episodes
    seed: Seed = 0
    noise: NonNegative | None = None  # standard deviation of the action noise; None: 0.5, with --expert 0
    repaired: bool = False  # without the stale observations of D4RL's script
    expert: bool = False  # demonstrations: episodes of full length to the task's goal, each with a reset
    reward_timing: Literal["same", "next"] | None = None  # position that is rewarded; None: same, or next with --expert
    minari: bool = False  # also write Minari datasets
    out: Path = GENERATED  # $REWIND_DATASETS or ~/.rewind/datasets
    overwrite: bool = False  # replace files that were made with other settings


class Planner:
    """Waypoints from tabular value iteration on the cells, followed by a PD controller (waypoint_controller.py)."""

    MOVES = ((0, 0), (0, -1), (0, 1), (-1, 0), (1, 0))  # ties go to the first

    def __init__(self, maze, rng):
        self.maze, self.rng, self.target, self.cells = maze, rng, None, set(free_cells(maze))

    @functools.cache  # noqa: B019 - a planner lives as long as its run
    def policy(self, target):
        """cell -> next cell, greedy after 50 sweeps of value iteration with discount 0.99 and reward 1 at the target"""
        moved = {c: [(c[0] + i, c[1] + j) for i, j in self.MOVES] for c in self.cells}
        neighbours = {c: [n if n in self.cells else c for n in moved[c]] for c in self.cells}
        value = dict.fromkeys(self.cells, 0.0)
        for _ in range(50):
            value = {c: (c == target) + 0.99 * max(value[n] for n in neighbours[c]) for c in self.cells}
        return {c: max(neighbours[c], key=value.get) for c in self.cells}

    def plan(self, position, target):
        cell = min(self.cells, key=lambda c: (c[0] - position[0]) ** 2 + (c[1] - position[1]) ** 2)
        policy, self.waypoints, self.target, self.at = self.policy(target), [], target, 0
        while not self.waypoints or cell != target:
            cell = policy[cell]
            shift = (0.0, 0.0) if cell == target else self.rng.uniform(0, 0.2, 2)
            self.waypoints.append((cell[0] - shift[0], cell[1] - shift[1]))

    def act(self, obs, target):
        """Action, clipped but without noise, and whether the target cell has been reached."""
        x, y, vx, vy = obs
        if target != self.target:
            self.plan((x, y), target)
        wx, wy = self.waypoints[self.at]
        if (wx - x) ** 2 + (wy - y) ** 2 < 0.01 and self.at < len(self.waypoints) - 1:
            self.at += 1  # from the next step on
        reached = (target[0] - x) ** 2 + (target[1] - y) ** 2 < 0.01
        return min(max(10 * (wx - x) - vx, -1.0), 1.0), min(max(10 * (wy - y) - vy, -1.0), 1.0), reached


def trajectory(maze, steps, seed, noise, repaired=False):
    """One endless trajectory: arrays obs, next_obs (N, 4), act (N, 2), ends (N,), targets (N, 2).

    next_obs is where the ball is after the row's step; obs of the row after an end is stale, as in D4RL, or repaired.
    """
    rng, env = np.random.default_rng(seed), Maze2d(maze)
    planner, cells = Planner(maze, rng), free_cells(maze)
    obs, next_obs, act = np.empty((steps, 4)), np.empty((steps, 4)), np.empty((steps, 2), np.float32)
    ends, targets, since = np.zeros(steps, bool), np.empty((steps, 2)), 0
    noises = rng.normal(0, noise, (steps, 2)) if noise else np.zeros((steps, 2))
    state, _ = env.reset(seed=seed)
    target = cells[rng.integers(len(cells))]
    for t in tqdm(range(steps), desc=f"maze2d-{maze}", unit="step", unit_scale=True, mininterval=1):
        ax, ay, reached = planner.act(state.tolist(), target)
        obs[t], targets[t], since = state, target, since + 1
        act[t] = min(max(ax + noises[t, 0], -1), 1), min(max(ay + noises[t, 1], -1), 1)
        next_obs[t] = env.step(act[t])[0]
        ends[t] = reached or since == MAX_STEPS[maze]
        if ends[t]:
            target, since = cells[rng.integers(len(cells))], 0
        if repaired and ends[t]:
            planner.target = None  # plan again, even if the new target is the old one
        if repaired or not ends[t]:  # D4RL's script keeps the old observation at an end
            state = next_obs[t]
    return obs, next_obs, act, ends, targets


def expert(maze, episodes, seed, noise, starts=None):
    """Episodes to the task's goal, each with a new planner: obs (E, T+1, 4), act (E, T, 2); starts (E, 4) or resets."""
    rng, env, T = np.random.default_rng(seed), Maze2d(maze), MAX_STEPS[maze]
    obs, act = np.empty((episodes, T + 1, 4)), np.empty((episodes, T, 2), np.float32)
    for e in tqdm(range(episodes), desc=f"maze2d-{maze} expert", unit="episode", mininterval=1):
        planner, (state, _) = Planner(maze, rng), env.reset(seed=seed + e)
        if starts is not None:
            env.set_state(starts[e, :2], starts[e, 2:])
            state = env.observation()
        for t in range(T):
            ax, ay, _ = planner.act(state.tolist(), goal_cell(maze))
            obs[e, t], act[e, t] = state, np.clip([ax, ay] + noise * rng.normal(size=2), -1, 1)
            state = env.step(act[e, t])[0]
        obs[e, T] = state
    return obs, act


def main(args):
    args = plumbing.validate(args)
    noise = args.noise if args.noise is not None else 0.0 if args.expert else 0.5
    timing = args.reward_timing or ("next" if args.expert else "same")
    steps = args.steps or (100 * MAX_STEPS[args.maze] if args.expert else STEPS[args.maze])
    suffix = "_expert" if args.expert else "_repaired" * args.repaired
    paths = [args.out / f"maze2d_{args.maze}{dense}{suffix}.hdf5" for dense in ("", "_dense")]
    settings = {"steps": steps, "seed": args.seed, "noise": noise, "reward_timing": timing}
    settings |= ({} if args.expert else {"repaired": args.repaired}) | {"mujoco": mujoco.__version__}
    for path in () if args.overwrite else paths:  # training would continue with other data under the same name
        if path.exists() and path.with_suffix(".json").exists():
            there = plumbing.read_json(path.with_suffix(".json"))
            there |= there.get("versions", {})
            differ = [f"{k} ({there.get(k)} there, here {v})" for k, v in settings.items() if there.get(k) != v]
            if differ:
                how = "use another --out, or --overwrite to replace it"
                raise UserError(f"{path} differs in {', '.join(differ)}; {how}")
    if args.expert:
        T = MAX_STEPS[args.maze]
        obs, act = expert(args.maze, -(-steps // T), args.seed, noise)
        before, after, act = obs[:, :-1].reshape(-1, 4), obs[:, 1:].reshape(-1, 4), act.reshape(-1, 2)
        ends, targets = np.arange(1, len(act) + 1) % T == 0, np.tile(goal_cell(args.maze), (len(act), 1))
    else:
        before, after, act, ends, targets = trajectory(args.maze, steps, args.seed, noise, args.repaired)
    facts = {"recipe": "expert planner" if args.expert else "planner to random targets"} | settings
    facts |= {"transitions": len(act), "segments": int(ends.sum())}
    facts |= {"stale_rows": int((before[1:] == before[:-1]).all(1).sum())}
    facts |= {"versions": plumbing.versions(mujoco, np, h5py)}
    facts |= {"args": {k: str(v) for k, v in asdict(args).items() if k != "out"}}
    for path, dense in zip(paths, (False, True), strict=True):
        rewards = Maze2d(args.maze, dense).reward((before if timing == "same" else after)[:, :2])
        arrays = {"observations": before.astype("f4"), "actions": act, "rewards": rewards.astype("f4")}
        arrays |= {"terminals": np.zeros(len(act), bool), "timeouts": ends, "infos/goal": targets.astype("f4")}
        successors = {"next_observations": after.astype("f4")}
        mean = float(rewards.mean())
        plumbing.write_hdf5(path, arrays | (successors if args.expert else {}), facts | {"reward_mean": mean})
        of = f"{facts['transitions']} transitions, {facts['segments']} segments"
        print(f"{path}: {of}, mean reward {mean:.4f}", file=sys.stderr)
        if args.minari:  # with successors, as the motion continues across its ends
            kind, script = f"{args.maze}{'-dense' * dense}", "datasets/maze2d.py"
            id, env = f"rewind/maze2d/{kind}{suffix.replace('_', '-')}-v0", f"Rewind/Maze2d-{kind}-v1"
            write_minari(id, arrays | successors, env, REFERENCE[f"maze2d-{kind}"], "planner", script, facts)


if __name__ == "__main__":
    plumbing.run_script(main, Args, __doc__)
