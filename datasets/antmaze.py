"""Generates D4RL's AntMaze data: D4RL's goal-reaching ant follows noisy waypoints through the maze.

Recipe: Farama-Foundation/D4RL, scripts/generation/generate_ant_maze_datasets.py and d4rl/locomotion/maze_env.py.

  1. A run has a start and a goal. umaze starts at R, all others in a random cell. The goal lies in the cell of GOALS
     nearest to the evaluation's (umaze, play), or in any of GOALS (diverse).
  2. At every step breadth-first search gives the next cell. The waypoint is this cell's centre + U(0, 1) on each axis,
     sampled anew, or the goal once the next cell is the goal's.
  3. D4RL's policy gets the direction; its action is sampled, N(0, 0.2^2) is added, and the sum is clipped.
  4. A run has 1001 rows. It does not end at its goal: the ant stays around it.
  5. Afterwards one evaluation goal is sampled for all rows; rewards and terminals are 1 where a step ends within 0.5 of
     it.

    python datasets/antmaze.py --task umaze                   # 1 000 000 steps, 10 minutes on one core
    python datasets/antmaze.py --task umaze --minari          # also as a Minari dataset: --env rewind/antmaze/umaze-v0
    python algorithms/romi_bcq.py --env antmaze-umaze --dataset generated --eval-episodes 100

The policy is D4RL's file ant_hierarch_pol.pkl, from $D4RL_DATASET_DIR or D4RL's server; it is read without executing
it. Output: HDF5 in D4RL layout, and a .json with recipe, versions, statistics and sha256. Every 100 runs are saved, so
repeating an interrupted command resumes it.

`timeouts` are as in D4RL's v2 files: the last row of each run, whose successor is not in the file. Consecutive terminal
rows are the ant near the rewarded goal. The Minari dataset has one episode per run, with these flags.

Differences from D4RL's files, which we have not seen: today's MuJoCo computes capsule masses exactly, which changes a
step by 0.8 % (RMS); the reward of a run's last row depends on where it led, theirs on the next start; infos/qpos and
infos/qvel are missing. Walks differ between CPUs, whose matrix products round differently: the numbers below are from a
CPU with AVX-512; with NumPy's AVX2 code seed 0 gives 6998 on medium-play.

Rewarded rows per million, which depend on the goal of step 5; D4RL's are the episodes of its files less 1000 time
limits; range: over 400 goals.

             umaze             umaze-diverse  medium-play  medium-diverse  large-play  large-diverse
    D4RL     9154              36             9768         1959            12517       6189
    seed 0   169226            -              8681         2585            -           -
    range    26838 to 265513   -              49 to 11421  4 to 3972       -           -

D4RL's script samples a run's goal from all of GOALS, also for play. But medium-play's 9768 are more than any goal gives
in diverse data, so our play data use one cell; --goals all follows the script.
"""

import collections
import functools
import json
import os
import pickle
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project's root, not this folder

import h5py
import mujoco
import numpy as np
from pydantic import PositiveInt

import plumbing
import utils
from envs.antmaze import CELL, RADIUS, AntMaze, free_cells, goal_cell, middle, sample_goal
from plumbing import NonNegative, Seed, UserError

ROWS = 1001  # per run: D4RL checks its counter before incrementing it
PART = 100  # runs per intermediate file
GOALS = {  # goal cells of D4RL's maps for data generation; first the one nearest to the evaluation's
    "umaze": [(3, 1)],
    "medium": [(6, 5), (2, 6), (5, 1)],
    "large": [(7, 9), (1, 6), (3, 5), (3, 10), (5, 2), (7, 4), (7, 6)],
}


@dataclass
class Args:
    task: Literal["umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play", "large-diverse"] = "umaze"
    steps: PositiveInt = 1_000_000
    seed: Seed = 0
    noise: NonNegative = 0.2  # standard deviation of the action noise
    goals: Literal["one", "all"] | None = None  # cells of GOALS; None: one for umaze and play, all for diverse
    minari: bool = False  # also write a Minari dataset
    out: Path = utils.GENERATED
    overwrite: bool = False  # replace files that were made with other settings


# --- D4RL's policy ---


class Inert:
    """Stands for every class and function named in the pickle: keeps its state and does nothing."""

    def __new__(cls, *args, **kwargs):
        return object.__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        if isinstance(state, dict):
            self.__dict__.update(state)


class StubUnpickler(pickle.Unpickler):
    """Reads D4RL's rlkit objects as Inert ones; tensors become (storage key, offset, size, stride)."""

    def find_class(self, module, name):
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *rest: (storage, offset, size, stride)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *rest: tensor
        if module.split(".")[0] in ("rlkit", "gym", "locomotion", "numpy", "torch", "_codecs"):
            return Inert
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, pid):
        return pid[1] if pid[0] == "module" else pid[2]  # class, source code; or storage type, key, device, size, view


def read_policy(path):
    """[(weight, bias)] of the three layers in D4RL's file, float32; the last has means, then log standard deviations.

    The file has torch < 1.6's format: pickles of a magic number, a protocol, the system, the objects and a list of
    storage keys, then the length and the float32 values of each storage.
    """
    try:
        with open(path, "rb") as f:
            _, _, _, saved, keys = (StubUnpickler(f).load() for _ in range(5))
            storages = {key: np.fromfile(f, "<f4", int(np.fromfile(f, "<i8", 1)[0])) for key in keys}

        def layer(name):
            parameters = saved["exploration/policy"]._modules[name]._parameters
            arrays = []
            for key, offset, size, stride in (parameters[k] for k in ("weight", "bias")):
                strides = tuple(4 * s for s in stride)
                arrays.append(np.ndarray(size, "<f4", storages[key], 4 * offset, strides).copy())
            return arrays

        first, second, mean, log_std = (layer(name) for name in ("fc0", "fc1", "last_fc", "last_fc_log_std"))
    except (pickle.UnpicklingError, EOFError, IndexError, KeyError, AttributeError, TypeError, ValueError) as e:
        raise UserError(f"{path}: is not D4RL's policy ({e})") from None
    return [first, second, [np.concatenate(x) for x in zip(mean, log_std, strict=True)]]


class Policy:
    """D4RL's ant: a tanh-squashed Gaussian, given the observation without x, y and a direction vector of length 10."""

    def __init__(self, layers):
        self.layers = layers

    def __call__(self, obs, waypoint, rng):
        way = waypoint - obs[:2]
        x = np.concatenate([obs[2:], 10 * way / max(np.linalg.norm(way), 1e-6)]).astype(np.float32)
        for i, (weight, bias) in enumerate(self.layers):
            x = weight @ x + bias
            x = np.maximum(x, 0) if i < 2 else x
        return np.tanh(x[:8] + np.exp(x[8:].clip(-20, 2)) * rng.standard_normal(8))


# --- waypoints ---


def cell_of(position):
    """(row, column) as in D4RL's search, where cells change at cell centres, not at borders."""
    return tuple(int(1 + max(p, 1e-4) / CELL) for p in (position[1], position[0]))


@functools.cache
def next_cell(maze, cell, target):
    """The next cell on a shortest path to the target, or the target if the ant is in it. Ties are broken as in D4RL,
    whose breadth-first search starts at the target and visits neighbours in this order."""
    free, seen = set(free_cells(maze)), [target]

    def around(c):
        return [n for i, j in ((0, -1), (0, 1), (1, 0), (-1, 0)) if (n := (c[0] + i, c[1] + j)) in free]

    for c in seen:  # grows in the loop
        seen += [n for n in around(c) if n not in seen]
    return target if cell == target else min(around(cell), key=seen.index, default=target)


def waypoint(maze, position, goal, rng):
    """Waypoint from a position: a new point in the next cell, or the goal if it is in that cell or the ant's own."""
    target = cell_of(goal)
    cell = next_cell(maze, cell_of(position), target)
    return goal if cell == target else middle(cell) + rng.uniform(0, 1, 2)


# --- data ---


def run_ant(env, act, rng, noise, goals, random_start):
    """One run to a goal in one of the cells `goals`: obs (T+1, 29), act (T, 8), goal (2,)"""
    position = None
    if random_start:  # not in a goal cell of D4RL's map
        cells = [cell for cell in free_cells(env.maze) if cell not in GOALS[env.maze]]
        position = middle(cells[rng.integers(len(cells))]) + rng.uniform(0, 1, 2)
    goal = sample_goal(goals[rng.integers(len(goals))], rng)
    state, obs, actions = env.start(rng, position), np.empty((ROWS + 1, 29), "f4"), np.empty((ROWS, 8), "f4")
    for t in range(ROWS):
        obs[t] = state
        action = act(state, waypoint(env.maze, state[:2], goal, rng), rng)
        actions[t] = np.clip(action + noise * rng.standard_normal(8), -1, 1)
        state = env.step(actions[t])[0]
    obs[ROWS] = state
    return obs, actions, goal


def collect(settings, act, folder):
    """Arrays in D4RL's layout, without rewards, and the next observations. Each run has its own generator, so that
    saved parts can be skipped."""
    folder.mkdir(parents=True, exist_ok=True)
    task, steps, seed, noise, goals = (settings[k] for k in ("task", "steps", "seed", "noise", "goals"))
    env, num_runs, parts = AntMaze(task.split("-")[0]), -(-steps // ROWS), []
    cells = GOALS[env.maze][: 1 if goals == "one" else None]
    made_with = json.dumps([task, seed, noise, goals, mujoco.__version__])
    progress = plumbing.progress(steps, f"antmaze-{task}", "step")
    for first in range(0, num_runs, PART):
        path, last = folder / f"{first:06}.npz", min(first + PART, num_runs)
        part = None
        if path.exists():
            with np.load(path) as f:
                part = dict(f) if f["made_with"] == made_with and len(f["goals"]) >= last - first else None
        if part is None:
            runs = []
            for e in range(first, last):
                # 1 + e: [seed, 0] is the generator of the rewarded goal
                runs.append(run_ant(env, act, np.random.default_rng([seed, 1 + e]), noise, cells, task != "umaze"))
                progress.update(min(ROWS, steps - e * ROWS))
            part = dict(zip(("obs", "act", "goals"), map(np.stack, zip(*runs, strict=True)), strict=True))
            new = path.with_suffix(f".{os.getpid()}.part.npz")
            np.savez(new, made_with=made_with, **part)
            os.replace(new, path)
        else:
            progress.update(min(last * ROWS, steps) - first * ROWS)
        parts.append({k: part[k][: last - first] for k in ("obs", "act", "goals")})
    progress.close()
    obs, actions, goals = (np.concatenate([part[k] for part in parts]) for k in ("obs", "act", "goals"))
    arrays = {"observations": obs[:, :-1], "actions": actions, "next_observations": obs[:, 1:]}
    arrays |= {"infos/goal": np.repeat(goals[:, None].astype("f4"), ROWS, 1)}
    arrays |= {"timeouts": np.tile(np.arange(1, ROWS + 1) == ROWS, (num_runs, 1))}
    return {k: v.reshape(num_runs * ROWS, *v.shape[2:])[:steps] for k, v in arrays.items()}


def relabel(arrays, goal):
    reached = np.linalg.norm(arrays["next_observations"][:, :2] - goal, axis=1) <= RADIUS
    return arrays | {"rewards": reached.astype("f4"), "terminals": reached}


def statistics(arrays):
    """Counts that are also known for D4RL's files, the share of complete runs that reach their own goal, and the median
    number of steps to it."""
    ends, rows = arrays["terminals"] | arrays["timeouts"], len(arrays["rewards"])
    begins = np.r_[True, ends[:-1]]
    stats = {"transitions": rows, "runs": int(arrays["timeouts"].sum()), "reward_rows": int(arrays["rewards"].sum())}
    stats |= {"episodes": int(ends.sum()) + (not ends[-1]), "one_step_episodes": int((ends & begins).sum())}
    if runs := stats["runs"]:
        way = arrays["next_observations"][: runs * ROWS, :2] - arrays["infos/goal"][: runs * ROWS]
        near = (np.linalg.norm(way, axis=1) <= RADIUS).reshape(runs, ROWS)
        came = near.any(1)
        stats |= {"success": round(float(came.mean()), 4)}
        stats |= {"median_steps": float(np.median(near[came].argmax(1) + 1)) if came.any() else None}
    return stats


def main(args, act=None):
    args = plumbing.validate(args)
    path = args.out / f"antmaze_{args.task.replace('-', '_')}.hdf5"
    settings = {k: getattr(args, k) for k in ("task", "steps", "seed", "noise")}
    settings |= {"goals": args.goals or ("all" if args.task.endswith("diverse") else "one")}
    settings |= {"mujoco": mujoco.__version__}
    kept = path.exists() and path.with_suffix(".json").exists() and not args.overwrite
    if kept:
        there = plumbing.read_json(path.with_suffix(".json"))
        there |= there.get("versions", {})
        differ = [f"{k} ({there.get(k)} there, here {v})" for k, v in settings.items() if there.get(k) != v]
        if differ:  # training would continue with other data under the same name
            differ = ", ".join(differ)
            raise UserError(f"{path} differs in {differ}; use another --out, or --overwrite to replace it")
        if not args.minari:
            return print(f"{path} exists; --overwrite generates it again", file=sys.stderr)
    act = act or Policy(read_policy(utils.ant_policy()))
    goal = sample_goal(goal_cell(args.task.split("-")[0]), np.random.default_rng(args.seed))
    arrays = relabel(collect(settings, act, path.with_suffix(".parts")), goal)
    stats = statistics(arrays)
    meta = {"recipe": "D4RL's ant on waypoints"} | settings | {"goal": goal.round(6).tolist()} | stats
    meta |= {"versions": plumbing.versions(mujoco, np, h5py)}
    if args.minari:
        env, name = f"Rewind/AntMaze-{args.task}-v2", f"rewind/antmaze/{args.task}-v0"
        runs = arrays | {"ends": arrays["timeouts"]}  # one episode per row near the goal would take gigabytes
        utils.write_minari(name, runs, env, utils.REFERENCE["antmaze"], "waypoints", "datasets/antmaze.py", meta)
    if not kept:  # its bytes depend on the CPU, and finished runs name them
        del arrays["next_observations"]  # D4RL's files have none
        plumbing.write_hdf5(path, arrays, meta | {"args": {k: str(v) for k, v in asdict(args).items() if k != "out"}})
    shutil.rmtree(path.with_suffix(".parts"))
    print(f"{path}: {json.dumps(stats)}", file=sys.stderr)


if __name__ == "__main__":
    plumbing.run_script(main, Args, __doc__)
