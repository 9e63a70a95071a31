"""Data loading and evaluation, shared by every script in `algorithms/`. Nothing here is something a paper has an opinion about.

  parse_task         task name -> Task (reference scores, environment, official file)
  load_dataset       task and --dataset -> Dataset (transitions as float32 tensors); load_expert: the same for demonstrations
  make_env           task -> Gymnasium environment, evaluate: policy -> returns, normalized_score: returns -> 0..100

Whatever a user can get wrong raises UserError, which the scripts print as one line `error: ...` before they exit with status 2.
"""

import contextlib
import difflib
import hashlib
import http.client
import io
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
import warnings
import zipfile
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import gymnasium
import h5py
import mujoco
import numpy as np
import torch
from tqdm import tqdm

from envs.relabelled import Relabelled, relabelled_reward
from plumbing import UserError, write_image

ROOT = Path(__file__).resolve().parent
HOME = os.path.expanduser("~")  # "~" itself for a user without a home, who must set the variables
BUNDLED = ROOT / "datasets" / "bundled"
GENERATED = Path(os.environ.get("REWIND_DATASETS", f"{HOME}/.rewind/datasets"))
D4RL = Path(os.environ.get("D4RL_DATASET_DIR", f"{HOME}/.d4rl/datasets"))
D4RL_URL = os.environ.get("REWIND_D4RL_URL", "https://rail.eecs.berkeley.edu/datasets/offline_rl")


# --- tasks ---

# Return of a random and of an expert policy: D4RL, d4rl/infos.py. The maze2d values are those of the v1 mazes.
REFERENCE = {
    "halfcheetah": (-280.178953, 12135.0),
    "hopper": (-20.272305, 3234.3),
    "walker2d": (1.629008, 4592.3),
    "ant": (-325.6, 3879.7),
    "maze2d-umaze": (23.85, 161.86),
    "maze2d-medium": (13.13, 277.39),
    "maze2d-large": (6.7, 273.99),
    "maze2d-umaze-dense": (68.537689, 193.66285642381482),
    "maze2d-medium-dense": (44.264742, 297.4552547777125),
    "maze2d-large-dense": (30.569041, 303.4857382709002),
    "antmaze": (0.0, 1.0),
}
WIDTHS = {
    "halfcheetah": (17, 6),
    "hopper": (11, 3),
    "walker2d": (17, 6),
    "ant": (27, 8),
    "maze2d": (4, 2),
    "antmaze": (29, 8),
}
MAX_STEPS = {"maze2d-umaze": 300, "maze2d-medium": 600, "maze2d-large": 800, "antmaze-umaze": 700}  # 1000 elsewhere
RELABELLED = {
    "jump": "halfcheetah",
    "angle": "ant",
}  # tasks that ask for something else than the agent did who made the data
# Bytes and the first 16 digits of the sha256 of the official files, where known (tensorflow/datasets, checksums.tsv).
CHECKSUMS = {
    "halfcheetah_random-v2": (237338037, "25407aef85b5d16c"),
    "halfcheetah_medium-v2": (237727262, "41324e8487a9556d"),
    "halfcheetah_medium_replay-v2": (59448533, "48d494a4770c11f4"),
    "halfcheetah_medium_expert-v2": (474567252, "015db75dae5bbe8e"),
    "halfcheetah_expert-v2": (237464597, "d9fe53bb994eb1e2"),
    "hopper_random-v2": (152525345, "63103ef7059db4c0"),
    "hopper_medium-v2": (152756557, "5bdf1bc4a713c829"),
    "hopper_medium_replay-v2": (75854457, "e121c5f7c9857a30"),
    "hopper_medium_expert-v2": (304537315, "9d51ad87f8c905be"),
    "hopper_expert-v2": (152427435, "01aa219a5f8eea5e"),
    "walker2d_random-v2": (216109364, "4e863bb6090cf4a4"),
    "walker2d_medium-v2": (232254996, "cf00f43add04c17f"),
    "walker2d_medium_replay-v2": (86323963, "e75de96a4f77acf7"),
    "walker2d_medium_expert-v2": (462197079, "6b8d7f868c45bbae"),
    "walker2d_expert-v2": (230567195, "2985dc3d436a8baa"),
    "ant_random-v2": (384466831, "93cc10893eed2b8e"),
    "ant_medium-v2": (376239825, "461c03b9f70f40d6"),
    "ant_medium_replay-v2": (136482252, "844c4e5743ef5109"),
    "ant_medium_expert-v2": (748335217, "8cfb64e62d8944b5"),
    "ant_expert-v2": (373231677, "fa22531ca79ea051"),
    "Ant_maze_u-maze_noisy_multistart_False_multigoal_False_sparse_fixed": (232532949, "5ef15257771c50ef"),
    "Ant_maze_u-maze_noisy_multistart_True_multigoal_True_sparse_fixed": (230854272, "c771dd63963cd7d9"),
    "Ant_maze_big-maze_noisy_multistart_True_multigoal_True_sparse_fixed": (231095166, "ad9dcbac05d1f874"),
    "Ant_maze_hardest-maze_noisy_multistart_True_multigoal_False_sparse_fixed": (230880653, "6d353df245782992"),
    "Ant_maze_hardest-maze_noisy_multistart_True_multigoal_True_sparse_fixed": (231183710, "84f775eb7956ea9c"),
}


@dataclass(frozen=True)
class Task:
    id: str
    """D4RL id with its version, or Minari id; also the first part of a run's name, with slashes as dashes"""
    domain: str
    """halfcheetah, hopper, walker2d, ant, maze2d, antmaze, or '' for a Minari data set of another environment"""
    kind: str
    """what follows the domain: medium-replay, umaze-dense, large-play, ..."""
    reference: tuple[float, float] | None
    """return of a random and of an expert policy"""
    max_steps: int = 1000
    sources: tuple[str, ...] = ()
    """what --dataset auto tries, in this order; () for a Minari data set"""
    file: str = ""
    """path of the official file below the server's folder"""
    env_spec: str = ""
    """evaluation environment of a Minari data set, as JSON"""

    @property
    def name(self):
        return f"{self.domain}-{self.kind}"

    @property
    def slug(self):
        return self.id.replace("/", "-")


def _d4rl_tasks():
    tasks = {}

    def add(name, version, domain, kind, reference, file):
        family = "-".join(name.split("-")[:2])
        sources = ("d4rl", "bundled", "generated") if file else ("generated",)
        tasks[f"{name}-{version}"] = Task(
            f"{name}-{version}", domain, kind, reference, MAX_STEPS.get(family, 1000), sources, file
        )

    for robot in ("halfcheetah", "hopper", "walker2d", "ant"):
        for kind in ("random", "medium", "medium-replay", "medium-expert", "expert"):
            file = f"gym_mujoco_v2/{robot}_{kind.replace('-', '_')}-v2.hdf5"
            add(f"{robot}-{kind}", "v2", robot, kind, REFERENCE[robot], file)
    for maze in ("umaze", "medium", "large"):
        for suffix, reward in (("", "sparse"), ("-dense", "dense")):
            name = f"maze2d-{maze}{suffix}"
            add(name, "v1", "maze2d", maze + suffix, REFERENCE[name], f"maze2d/maze2d-{maze}-{reward}-v1.hdf5")
    for kind, maze, start, goal in (
        ("umaze", "u-maze", False, False),
        ("umaze-diverse", "u-maze", True, True),
        ("medium-play", "big-maze", True, False),
        ("medium-diverse", "big-maze", True, True),
        ("large-play", "hardest-maze", True, False),
        ("large-diverse", "hardest-maze", True, True),
    ):
        stem = f"Ant_maze_{maze}_noisy_multistart_{start}_multigoal_{goal}_sparse"
        add(f"antmaze-{kind}", "v0", "antmaze", kind, REFERENCE["antmaze"], f"ant_maze_new/{stem}.hdf5")
        add(f"antmaze-{kind}", "v2", "antmaze", kind, REFERENCE["antmaze"], f"ant_maze_v2/{stem}_fixed.hdf5")
    for kind, robot in RELABELLED.items():  # MOPO's tasks, which have no official data
        add(f"{robot}-{kind}", "v1", robot, kind, None, "")
    return tasks


TASKS = _d4rl_tasks()


def parse_task(name):
    """Task of a D4RL name (`hopper-medium-replay`, with or without version) or of a Minari id (`mujoco/hopper/medium-v0`)."""
    for candidate in (name, f"{name}-v2", f"{name}-v1"):  # the version that the field reports: v2, for maze2d v1
        if candidate in TASKS:
            return TASKS[candidate]
    is_environment = name in gymnasium.registry or name.startswith("Rewind/")  # ours are registered by envs/
    if (
        re.fullmatch(r"([\w-]+/)*[\w-]+-v\d+", name)
        and ("/" in name or _minari_is_local(name))
        and not name.startswith("Rewind/")
    ):
        return _minari_task(name)
    short = sorted({re.sub(r"-v\d$", "", n) for n in TASKS})
    near = difflib.get_close_matches(re.sub(r"-v\d$", "", name.removeprefix("Rewind/").lower()), short, 3, 0.5)
    hint = (
        f"did you mean {', '.join(near)}?"
        if near
        else "tasks are D4RL names such as hopper-medium-replay, or Minari ids"
    )
    what = "is an environment, not a data set" if is_environment else "is no known task"
    raise UserError(f"--env {name} {what}; {hint}")


def normalized_score(task, returns):
    """D4RL's normalised score, 0 for a random policy and 100 for an expert; None where the task has no reference scores."""
    if task.reference is None:
        return None
    low, high = task.reference
    return 100.0 * (returns - low) / (high - low)


# --- data ---


@dataclass
class Dataset:
    """Transitions of one data set, rows in recorded order, float32 tensors on the CPU."""

    obs: torch.Tensor  # (N, O)
    act: torch.Tensor  # (N, A), within [-1, 1]
    rew: torch.Tensor  # (N,)
    next_obs: torch.Tensor  # (N, O)
    terminated: torch.Tensor  # (N,) 1 where the MDP ended; a time limit is no end
    has_next: torch.Tensor  # (N,) bool; False: next_obs is unknown (a copy of obs), the row must not teach a model
    trajectory: torch.Tensor  # (N,) int64, number of the trajectory segment
    id: str = ""
    source: str = ""
    """d4rl, bundled, generated, minari or file"""
    sha256: str = ""
    path: str = ""
    more_facts: dict = field(default_factory=dict)
    """what facts() says beside its own, such as the demonstrations used with this data"""

    def __len__(self):
        return len(self.rew)

    def trajectory_returns(self):
        """(N,) float64: undiscounted return of the trajectory that each row belongs to."""
        sums = torch.zeros(int(self.trajectory[-1]) + 1, dtype=torch.float64)
        return sums.index_add_(0, self.trajectory, self.rew.double())[self.trajectory]

    def goal(self):
        """Of an antmaze, (2,): rewarded positions lie within 0.5 of it, so it is their middle."""
        reached = torch.where(self.has_next[:, None], self.next_obs, self.obs)[self.terminated > 0, :2]
        if not len(reached):
            raise UserError("--dataset: no row of it ends at the goal, so where imagined episodes end is unknown")
        return (reached.amax(0) + reached.amin(0)) / 2

    def facts(self):
        """What config.json and result.json say about the data."""
        return {"id": self.id, "source": self.source, "sha256": self.sha256, "transitions": len(self)} | self.more_facts


def pack(obs, act, rew, next_obs, terminated):
    """Transitions as rows of one matrix, so that a batch is one index operation: (B, 2 O + A + 2)"""
    return torch.cat([obs, act, rew[:, None], next_obs, terminated[:, None].float()], -1)


def unpack(rows, obs_dim, act_dim):
    obs, act, rew, next_obs, terminated = rows.split([obs_dim, act_dim, 1, obs_dim, 1], -1)
    return obs, act, rew.squeeze(-1), next_obs, terminated.squeeze(-1)


def file_sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def load_dataset(task, source="auto", check_widths=True, rewards=True):
    """Dataset of `task` from `source`: auto, d4rl, bundled, generated, a Minari id, or the path of an HDF5 file in D4RL layout.

    rewards: whether they are needed; if not, a file may lack them, and `rew` is 0.

    Episode ends. A terminal does not bootstrap (terminated = 1), a time limit does. The successor of a row is its
    `next_observations` entry where the file has them, else the next row of the same episode. Without `next_observations`
    the last row of an episode has no known successor: a terminal row is kept for Q learning (has_next False), any other is
    dropped, as D4RL's qlearning_dataset does. A row that is both terminal and timeout counts as terminal. Terminal rows of
    an antmaze do have a successor: the ant ran on while the data was recorded.
    """
    kind, path = _find(task, source)
    if kind == "minari":
        data = _read_minari(path)
    else:
        data = _read_hdf5(Path(path), task, rewards)
        data.sha256 = file_sha256(path)
        data.id = task.id if kind == "d4rl" else Path(path).stem
    data.source, data.path = kind, str(path)
    if (
        check_widths and task.domain and path != task.id
    ):  # a Minari task's own data may be wider: Ant-v5 has 105 observations
        for name, have, want in zip(
            ("observations", "actions"), (data.obs, data.act), WIDTHS[task.domain], strict=True
        ):
            if have.shape[1] != want:
                raise UserError(
                    f"{path}: {name} have {have.shape[1]} entries, {task.id} has {want}; is it the file of another task?"
                )
    if task.kind in RELABELLED and rewards:
        act, next_obs, rew = (x[data.has_next].double().numpy() for x in (data.act, data.next_obs, data.rew))
        if not np.allclose(relabelled_reward(task.kind, act, next_obs), rew, atol=1e-2):
            raise UserError(
                f"{path}: its rewards are not those of {task.id}; write envs.relabelled.relabelled_reward of its rows into them"
            )
    return data


def load_expert(task, source, trajectories, data):
    """Dataset of demonstrations to go with `data`, whose facts then name them: the first `trajectories` that `source` has.

    auto takes the data set of the robot's expert, wherever load_dataset finds it, or on a maze the planner's episodes to the
    task's goal, made on first use. The path may also be that of an .npz file with the arrays of D4RL's layout.
    """
    try:
        if task.domain == "maze2d" and source in ("auto", "generated"):
            path = GENERATED / f"maze2d_{task.kind.replace('-', '_')}_expert.hdf5"
            if not path.exists():
                _generate_maze2d(task, path, "--expert")
            expert = replace(load_dataset(task, str(path), rewards=False), source="generated")
        elif source not in ("auto", "d4rl", "bundled", "generated"):
            expert = load_dataset(task, source, rewards=False)
        elif f"{task.domain}-expert-v2" in TASKS and task.file:
            expert = load_dataset(TASKS[f"{task.domain}-expert-v2"], source, rewards=False)
        else:
            auto = "auto, " if task.domain == "maze2d" else ""
            raise UserError(
                f"--dataset {source}: there are no demonstrations for {task.id}; give {auto}a Minari id or the path of a file"
            )
    except UserError as e:
        raise UserError(str(e).replace("--dataset", "--expert-dataset"), e.status) from None
    for name, have, want in zip(
        ("observations", "actions"), (expert.obs, expert.act), (data.obs, data.act), strict=True
    ):
        if have.shape[1] != want.shape[1]:
            raise UserError(
                f"{expert.path}: {name} of the expert have {have.shape[1]} entries, those of {data.path} {want.shape[1]}"
            )
    if (have := int(expert.trajectory[-1]) + 1) < trajectories:
        raise UserError(f"--expert-trajectories {trajectories}: {expert.path} has {have}")
    rows, columns = (
        expert.trajectory < trajectories,
        [f.name for f in fields(expert) if isinstance(getattr(expert, f.name), torch.Tensor)],
    )
    expert = replace(expert, **{name: getattr(expert, name)[rows] for name in columns})
    data.more_facts = {"expert": expert.facts() | {"trajectories": trajectories}}
    return expert


def _find(task, source):
    """(kind, path or Minari id) of the data set; `auto` tells which it took."""
    if not task.sources and source == "auto":
        return "minari", task.id
    local = {"bundled": BUNDLED, "generated": GENERATED}
    name = task.id.rsplit("-v", 1)[0]
    stem = f"{task.domain}_{task.kind.replace('-', '_')}"
    how = {
        "d4rl": f"place {Path(task.file).name} into {D4RL}, or connect to the internet",
        "bundled": "only hopper-medium-replay ships with the repository"
        if BUNDLED.is_dir()
        else f"{BUNDLED} is missing, copy it from the repository",
        "generated": f"make it with: python datasets/mujoco.py --env {task.domain} --kinds {task.kind}",
    }
    if task.domain == "maze2d":
        how["generated"] = f"make it with: python datasets/maze2d.py --maze {task.kind.split('-')[0]}"
    if task.domain == "antmaze":
        how["generated"] = "no script makes this data set"
    if source in ("auto", *how):
        if not task.sources:
            raise UserError(f"--dataset {source}: {task.id} is a Minari data set; use --dataset auto")
        how = {k: v for k, v in how.items() if k in task.sources}
        if source != "auto" and source not in how:
            raise UserError(f"--dataset {source}: {task.id} exists as {', '.join(how)} data only; {how['generated']}")
        why = []
        for kind in how if source == "auto" else (source,):
            if kind == "d4rl":
                path = D4RL / Path(task.file).name
                if not path.exists():
                    try:
                        download(f"{D4RL_URL}/{task.file}", path, *CHECKSUMS.get(path.stem, (None, None)))
                    except UserError as e:
                        why.append(str(e))
            else:
                path = local[kind] / f"{stem}.hdf5"
            if kind == "generated" and task.domain == "maze2d" and not path.exists():
                _generate_maze2d(task, path)
            if path.exists():
                if source == "auto":
                    print(f"data: {kind} {path.name}" + (f" ({'; '.join(why)})" if why else ""), file=sys.stderr)
                return kind, path
        hints = "; ".join(how[k] for k in (how if source == "auto" else (source,)))
        raise UserError(
            f"--dataset {source}: no data for {name} ({'; '.join([*why, hints])}; or give the path of an HDF5 file)"
        )
    path = Path(source).expanduser()
    if path.suffix in (".hdf5", ".h5") or path.exists():
        if not path.is_file():
            raise UserError(
                f"--dataset {source}: {'is a folder' if path.is_dir() else 'no such file'}; give the path of an HDF5 file"
            )
        return "file", path
    if re.fullmatch(r"([\w-]+/)*[\w-]+-v\d+", source):
        return "minari", source
    raise UserError(f"--dataset {source}: neither a file, nor a Minari id, nor one of auto, {', '.join(how)}")


def _generate_maze2d(task, path, *flags):
    """Seconds per million steps: cheap enough to make on first use."""
    if not (ROOT / "datasets" / "maze2d.py").is_file():
        raise UserError(
            f"{path} is not there, and datasets/maze2d.py, which makes it, is not either: copy it from the repository"
        )
    print(f"data: making {path.name} with datasets/maze2d.py", file=sys.stderr)
    command = [
        sys.executable,
        ROOT / "datasets" / "maze2d.py",
        "--maze",
        task.kind.split("-")[0],
        "--out",
        path.parent,
        *flags,
    ]
    if subprocess.run(command).returncode:
        raise UserError(f"datasets/maze2d.py could not make {path}")


def download(url, path, size=None, sha256=None, timeout=10):
    """Fetch `url` to `path`; the file appears under its name only when it is complete and matches `size` and `sha256` (prefix)."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=timeout) as response, open(part, "wb") as f:
            size = size or int(response.headers.get("Content-Length") or 0) or None
            digest = hashlib.sha256()
            with tqdm(total=size, desc=path.name, unit="B", unit_scale=True) as bar:
                while chunk := response.read(1 << 20):
                    f.write(chunk)
                    digest.update(chunk)
                    bar.update(len(chunk))
            if size and f.tell() != size:
                raise UserError(f"{url}: got {f.tell()} of {size} bytes; run again to retry")
        if sha256 and not digest.hexdigest().startswith(sha256):
            raise UserError(
                f"{url}: sha256 {digest.hexdigest()[:16]} is not the known {sha256}; the server's file has changed"
            )
        os.replace(part, path)
    except (OSError, http.client.HTTPException, ValueError) as e:
        raise UserError(f"cannot download {url}: {getattr(e, 'reason', e)}") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def _npz_as_hdf5(path):
    """The arrays of an .npz file as an HDF5 file in memory."""
    try:
        with np.load(path) as arrays:
            f = h5py.File(io.BytesIO(), "w")
            for name in arrays.files:
                f[name] = arrays[name]
            return f
    except (ValueError, TypeError, EOFError, zipfile.BadZipFile) as e:
        raise OSError(e) from None


def _read_hdf5(path, task, rewards=True):
    bad = f"{path}: "
    try:
        f = _npz_as_hdf5(path) if path.suffix == ".npz" else h5py.File(path, "r")
    except OSError as e:
        kind = "npz" if path.suffix == ".npz" else "HDF5"
        raise UserError(f"{bad}cannot be read as {kind} ({str(e)[:80]}); is the file complete?") from None
    with f:

        def read(key, dtype, ndim, required=True):
            try:
                if key not in f:
                    if required:
                        raise UserError(
                            f"{bad}has no array '{key}'; D4RL layout needs observations, actions, rewards, terminals"
                        )
                    return None
                if not isinstance(f[key], h5py.Dataset) or f[key].dtype.kind not in "fiub":
                    raise UserError(f"{bad}'{key}' does not hold numbers")
                shape = f[key].shape or ()
                if len(shape) == 2 and ndim == 1 and shape[1] == 1:  # (N, 1) is a common way to write rewards
                    shape = shape[:1]
                if len(shape) != ndim:
                    raise UserError(
                        f"{bad}'{key}' has shape {f[key].shape}, expected {ndim} dimension{'s'[: ndim - 1]}"
                    )
                out = np.empty(
                    f[key].shape, f[key].dtype if dtype is bool else dtype
                )  # HDF5 cannot turn float flags into bool
                if out.size:
                    f[key].read_direct(out)  # converts on the fly: no second copy in the file's own precision
            except (OSError, KeyError, RuntimeError, ValueError, MemoryError) as e:  # h5py's answers to a damaged file
                raise UserError(f"{bad}'{key}' cannot be read ({str(e)[:80]}); is the file complete?") from None
            if dtype is bool and not ((out == 0) | (out == 1)).all():
                raise UserError(f"{bad}'{key}' holds other values than 0 and 1")
            return out.reshape(shape).astype(dtype, copy=False)

        obs = read("observations", np.float32, 2)
        act = read("actions", np.float32, 2)
        rew = read("rewards", np.float32, 1, required=rewards)
        terminals = read("terminals", bool, 1)
        timeouts = read("timeouts", bool, 1, required=False)
        next_obs = read("next_observations", np.float32, 2, required=False)
    rew = np.zeros(len(obs), np.float32) if rew is None else rew
    arrays = {"observations": obs, "actions": act, "rewards": rew, "terminals": terminals}
    arrays |= {k: v for k, v in (("timeouts", timeouts), ("next_observations", next_obs)) if v is not None}
    lengths = {k: len(v) for k, v in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise UserError(f"{bad}arrays differ in length: {lengths}")
    if not (obs.size and act.size):
        raise UserError(f"{bad}is empty")
    if next_obs is not None and next_obs.shape != obs.shape:
        raise UserError(f"{bad}next_observations have {next_obs.shape[1]} entries, observations {obs.shape[1]}")
    for k, v in arrays.items():
        if v.dtype == np.float32 and not np.isfinite(v).all():
            raise UserError(
                f"{bad}'{k}' holds NaN or inf in row {int(np.flatnonzero(~np.isfinite(v.reshape(len(v), -1)).all(1))[0])}"
            )
    if task.domain == "ant" and obs.shape[1] == 111:  # D4RL's contact forces are all zero, and today's Ant-v4 has none
        obs, next_obs = (
            np.ascontiguousarray(obs[:, :27]),
            None if next_obs is None else np.ascontiguousarray(next_obs[:, :27]),
        )
    if task.domain == "maze2d" and (~obs.any(1)).any():
        raise UserError(
            f"{bad}has all-zero observations, the known defect of maze2d files from before December 2020; get the current file"
        )
    if timeouts is None:
        timeouts = _timeouts_from_horizon(terminals, task.max_steps)
    if task.domain == "antmaze" and task.id.endswith("v0"):  # its flags are out of step with the resets; ROMI's rule
        jump = np.linalg.norm(np.diff(obs[:, :2], axis=0), axis=1)
        timeouts = np.r_[jump > 10 * jump.mean(), True]
    # An antmaze was not left at the goal: the row after a terminal one is its successor, and without it no model would see a reward.
    return _from_arrays(obs, act, rew, next_obs, terminals, timeouts, bad, terminals_go_on=task.domain == "antmaze")


def _timeouts_from_horizon(terminals, max_steps):
    """Files made by D4RL's own scripts may lack timeouts: an episode then ends when the task's horizon is reached."""
    timeouts, begin = np.zeros_like(terminals), 0
    for end in np.r_[np.flatnonzero(terminals), len(terminals) - 1]:
        timeouts[begin + max_steps - 1 : end + 1 : max_steps] = True
        begin = end + 1
    return timeouts & ~terminals


def _from_arrays(obs, act, rew, next_obs, terminals, timeouts, bad, terminals_go_on=False):
    n = len(rew)
    if np.abs(act).max() > 1 + 1e-4:
        raise UserError(f"{bad}actions reach {np.abs(act).max():.4g}, outside [-1, 1]; rescale them to the action box")
    np.clip(act, -1, 1, out=act)
    ends = terminals | timeouts
    if next_obs is not None:
        # Some files leave time limits unmarked: a row whose successor is not the next row ends a trajectory.
        step = 1e-4 * (1 + np.abs(obs).max(0))
        ends[:-1] |= (np.abs(next_obs[:-1] - obs[1:]) > step).any(1)
    if not ends.any():
        raise UserError(f"{bad}holds no complete episode: neither terminals nor timeouts mark an end")
    if next_obs is None:
        ends[-1] = True  # where a fragment ends is an end too, but its last row has no successor
        unknown = timeouts if terminals_go_on else ends
        unknown[-1] = True
        keep, has_next = ~unknown | terminals, ~unknown
        next_obs = np.empty_like(obs)
        next_obs[:-1] = obs[1:]
        next_obs[unknown] = obs[unknown]
    else:
        keep = has_next = np.ones(n, bool)
    if not keep.any():
        raise UserError(f"{bad}holds no complete transition")
    trajectory = np.r_[0, np.cumsum(ends[:-1])]
    arrays = [obs, act, rew, next_obs, terminals.astype(np.float32), has_next, trajectory]
    del obs, act, rew, next_obs
    if not keep.all():
        for i in range(len(arrays)):  # one at a time, so that no second copy of everything exists
            arrays[i] = arrays[i][keep]
        arrays[-1] = np.unique(arrays[-1], return_inverse=True)[1]
    return Dataset(*(torch.from_numpy(np.ascontiguousarray(x)) for x in arrays))


# --- Minari ---


def _minari_is_local(dataset_id):
    root = Path(os.environ.get("MINARI_DATASETS_PATH", f"{HOME}/.minari/datasets"))
    return (root / dataset_id / "data" / "metadata.json").exists()


def _minari(dataset_id):
    """The Minari data set, downloaded if it is not here."""
    import minari

    try:
        return minari.load_dataset(dataset_id, download=not _minari_is_local(dataset_id))
    except Exception as e:  # the remote raises errors of whichever HTTP library it uses; they share no base class
        message = f"Minari data set {dataset_id} cannot be had ({type(e).__name__}: {str(e)[:100]})"
        raise UserError(f"{message}; see `minari list remote`, or download it where there is a network") from None


def _minari_task(dataset_id):
    storage = _minari(dataset_id).storage.metadata
    spec = storage.get("eval_env_spec") or storage.get("env_spec") or ""
    robots = {"HalfCheetah": "halfcheetah", "Hopper": "hopper", "Walker2d": "walker2d", "Ant": "ant"}
    env = json.loads(spec)["id"] if spec else ""
    domain, kind = robots.get(env.split("-")[0], ""), dataset_id.split("/")[-1]
    if env.startswith("Rewind/Maze2d-"):  # of datasets/maze2d.py
        domain, kind = "maze2d", env.removeprefix("Rewind/Maze2d-").removesuffix("-v1")
    reference = (
        (storage["ref_min_score"], storage["ref_max_score"]) if storage.get("ref_max_score") is not None else None
    )
    return Task(
        dataset_id, domain, kind, reference, MAX_STEPS.get(f"{domain}-{kind.split('-')[0]}", 1000), env_spec=spec
    )


def _read_minari(dataset_id):
    """Rows of all episodes; read once, then kept as flat arrays, because Minari reads episode by episode (seconds per 1000)."""
    data = _minari(dataset_id)
    folder = Path(data.storage.data_path)
    digest = hashlib.sha256()
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(bytes.fromhex(file_sha256(file)))
    sha256, bad = digest.hexdigest(), f"Minari data set {dataset_id}: "
    cache = GENERATED.parent / "cache" / f"{sha256}.npz"
    if cache.exists():
        with np.load(cache) as arrays:
            flat = [arrays[k] for k in ("obs", "act", "rew", "next_obs", "terminals", "timeouts")]
    else:
        for name, space in (("observations", data.spec.observation_space), ("actions", data.spec.action_space)):
            if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1:
                raise UserError(
                    f"{bad}its {name} are {str(space)[:80]}; these algorithms need a vector of continuous {name}"
                )
        parts = [[] for _ in range(6)]
        for episode in tqdm(
            data.iterate_episodes(), total=data.total_episodes, desc=dataset_id, unit="episode", leave=False
        ):
            obs = episode.observations
            end = np.zeros(len(episode.rewards), bool)
            end[-1] = True  # an episode's end is an end of a trajectory whatever its flags say
            rows = (
                obs[:-1],
                episode.actions,
                episode.rewards,
                obs[1:],
                episode.terminations,
                end & ~episode.terminations,
            )
            for part, row in zip(parts, rows, strict=True):
                part.append(row)
        if not parts[0]:
            raise UserError(f"{bad}is empty")
        dtypes = (np.float32,) * 4 + (bool,) * 2
        flat = [np.concatenate(p).astype(t) for p, t in zip(parts, dtypes, strict=True)]
        low, high = np.asarray(space.low, np.float32), np.asarray(space.high, np.float32)
        if np.isfinite(low).all() and np.isfinite(high).all():
            flat[1] = (2 * (flat[1] - low) / (high - low) - 1).clip(-1, 1)  # to [-1, 1]; make_env undoes it
        for name, x in zip(("observations", "actions", "rewards", "next observations"), flat, strict=False):
            if not np.isfinite(x).all():
                raise UserError(f"{bad}{name} hold NaN or inf")
        with contextlib.suppress(OSError):  # a folder that cannot be written costs time at the next start, nothing else
            cache.parent.mkdir(parents=True, exist_ok=True)
            part = cache.with_suffix(f".{os.getpid()}.part.npz")
            np.savez(part, **dict(zip(("obs", "act", "rew", "next_obs", "terminals", "timeouts"), flat, strict=True)))
            os.replace(part, cache)
    out = _from_arrays(*flat, bad)
    out.id, out.sha256 = dataset_id, sha256
    return out


def write_minari(dataset_id, data, env, reference, algorithm, script, facts):
    """Arrays of D4RL's layout, `next_observations` among them, as a Minari data set, an episode per terminal or timeout; one of
    this id is replaced. env: a registered id; reference: return of a random and of an expert policy; facts: dict for the description."""
    import minari
    from minari.data_collector import EpisodeBuffer
    from minari.storage import get_dataset_path

    shutil.rmtree(
        get_dataset_path(dataset_id), ignore_errors=True
    )  # also what a killed run left, which Minari does not list
    ended = data["terminals"] | data["timeouts"]
    ended[-1] = True
    begin, buffers = 0, []
    for i, end in enumerate(np.flatnonzero(ended) + 1):
        rows = slice(begin, end)
        obs = np.concatenate([data["observations"][rows], data["next_observations"][end - 1 : end]])
        flags = dict(terminations=data["terminals"][rows], truncations=ended[rows] & ~data["terminals"][rows])
        buffers.append(
            EpisodeBuffer(id=i, observations=obs, actions=data["actions"][rows], rewards=data["rewards"][rows], **flags)
        )
        begin = end
    minari.create_dataset_from_buffers(
        dataset_id,
        buffers,
        env=env,
        eval_env=env,
        observation_space=gymnasium.spaces.Box(-np.inf, np.inf, data["observations"].shape[1:], np.float32),
        action_space=gymnasium.spaces.Box(-1, 1, data["actions"].shape[1:], np.float32),
        algorithm_name=algorithm,
        author="Rewind",
        author_email="none",
        code_permalink=script,
        description=json.dumps(facts),
        ref_min_score=reference[0],
        ref_max_score=reference[1],
    )
    print(f"Minari data set {dataset_id}: {len(buffers)} episodes", file=sys.stderr)


# --- evaluation ---


def make_env(task):
    """Evaluation environment of a Task, or of a robot's name; actions in [-1, 1].

    The robots are Gymnasium's v4, the closest relatives of D4RL's v2. MuJoCo 3.5 began to add the contact margins of two
    geoms where it had taken the larger one, so hopper and ant touch the ground earlier than ever before; halving all
    margins restores the old physics (one-step errors against MuJoCo 2.2.0: tests/test_utils.py).
    """
    domain = task if isinstance(task, str) else task.domain
    robots = {"hopper": "Hopper-v4", "halfcheetah": "HalfCheetah-v4", "walker2d": "Walker2d-v4", "ant": "Ant-v4"}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is out of date.*")
        ours = domain == "maze2d" or (domain in robots and not isinstance(task, str) and task.id.startswith("rewind/"))
        if not isinstance(task, str) and not task.sources and not ours:
            return _minari_env(task)  # our own Minari data sets cannot store the corrected margins
        if domain == "maze2d":
            import envs.maze2d  # noqa: F401 - registers the mazes

            return gymnasium.make(f"Rewind/Maze2d-{task.kind}-v1")
        if domain not in robots:
            raise UserError(
                f"there is no evaluation environment for {getattr(task, 'id', task)}; use --eval-episodes 0"
            )
        handler = mujoco.get_mju_user_warning()
        mujoco.set_mju_user_warning(
            lambda message: None
        )  # of a deprecated word in halfcheetah's XML, once an environment
        try:
            env = gymnasium.make(robots[domain])
        finally:
            mujoco.set_mju_user_warning(handler)
    version = tuple(int(n) for n in mujoco.__version__.split(".")[:2])
    if domain in ("hopper", "ant") and version >= (3, 5):
        env.unwrapped.model.geom_margin[:] *= 0.5
    return Relabelled(env, task.kind) if not isinstance(task, str) and task.kind in RELABELLED else env


def _minari_env(task):
    """The environment stored with a Minari data set, as it is: its scores belong to that data set, not to a D4RL task."""
    try:
        env = gymnasium.make(gymnasium.envs.registration.EnvSpec.from_json(task.env_spec))
    except Exception as e:
        why = f"{type(e).__name__}: {str(e)[:100]}" if task.env_spec else "none is stored with it"
        raise UserError(f"--env {task.id}: no evaluation environment ({why}); use --eval-episodes 0") from None
    space = env.action_space
    if not isinstance(space, gymnasium.spaces.Box):
        raise UserError(f"--env {task.id}: actions are {space}; these algorithms need continuous actions")
    if np.isfinite(space.low).all() and np.isfinite(space.high).all():
        env = gymnasium.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))
    return env


@torch.no_grad()
def rollout(envs, act, seed):
    """One episode in every environment of `envs`, all stepped together; act: obs (B, O) tensor -> actions (B, A).

    Episode i is seeded with seed + i. Returns a list of observations, (T+1, O) float32 each, and one of rewards, (T,) each.
    Random numbers that `act` draws from torch are seeded too, and the caller's generators are put back.
    """
    seen = [[np.asarray(env.reset(seed=seed + i)[0], np.float32)] for i, env in enumerate(envs)]
    rewards, alive = [[] for _ in envs], list(range(len(envs)))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        while alive:
            actions = np.asarray(act(torch.from_numpy(np.stack([seen[i][-1] for i in alive]))))
            if not np.isfinite(actions).all():
                raise UserError("actions are not finite: the policy has diverged", status=3)
            ended = []
            for i, action in zip(alive, actions, strict=True):
                obs, rew, terminated, truncated, _ = envs[i].step(action)
                seen[i].append(np.asarray(obs, np.float32))
                rewards[i].append(rew)
                if terminated or truncated:
                    ended.append(i)
            alive = [i for i in alive if i not in ended]
    return [np.stack(s) for s in seen], [np.array(r, float) for r in rewards]


def evaluate(task, envs, act, seed, gamma, folder=None, episodes=None):
    """Metrics of deterministic episodes, seeded apart from training and from other seeds; on a maze <folder>/execution.png.

    A list given as `episodes` gets the observations of every episode, (T+1, O) each. The discounted return looks as far as
    a learner does, to compare with Q values: policies of equal discounted return may differ a lot in score.
    """
    seen, rewards = rollout(envs, act, 1000 * seed + 100)
    returns = np.array([r.sum() for r in rewards])
    draw_maze(task, seen, folder, "execution")
    if episodes is not None:
        episodes.extend(seen)
    metrics = {"return": returns.mean().item(), "return_std": returns.std().item()}
    metrics |= {
        "length": float(np.mean([len(r) for r in rewards])),
        "normalized_score": normalized_score(task, returns.mean().item()),
    }
    metrics |= {"discounted_return": float(np.mean([r @ gamma ** np.arange(len(r)) for r in rewards]))}
    return {f"eval/{k}": v for k, v in metrics.items()}


def draw_maze(task, trajectories, folder, name):
    """On a maze, the top view of some trajectories, (T, O) each, as <folder>/<name>.png."""
    if folder is not None and task.domain == "maze2d":
        from envs.maze2d import view_trajectories

        write_image(folder / f"{name}.png", view_trajectories(task.kind.split("-")[0], trajectories[:100]))


def describe_imagination(task, obs, act, rew, next_obs, terminated, chains, folder):
    """Metrics of imagined rows (M, ...). On a maze also what the simulator says of some chains: lists of h tuples (obs, act,
    next_obs), (C, ...) each, in forward time."""
    stats = {
        "reward_min": rew.min(),
        "reward_max": rew.max(),
        "reward_mean": rew.mean(),
        "terminated": terminated.mean(),
    }
    stats = {f"model/imagined_{k}": v for k, v in stats.items()}
    if task.domain == "maze2d" and (n := min(len(step[0]) for step in chains)):
        from envs.maze2d import replay_error

        obs, act, next_obs = (torch.stack([step[k][:n].cpu() for step in chains], 1) for k in range(3))  # (C, h, ...)
        draw_maze(task, torch.cat([obs[:, :1], next_obs], 1).numpy(), folder, "imagination")
        one, all_steps = replay_error(task.kind.split("-")[0], *(x.double().numpy() for x in (obs, act, next_obs)))
        stats |= {"model/replay_error_1": one, f"model/replay_error_{len(chains)}": all_steps}
    return stats
