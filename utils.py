"""Data loading and evaluation for the scripts in `algorithms/`: independent of any paper's method.

  parse_task         task name -> Task (reference scores, environment, official file)
  load_dataset       task and --dataset -> Dataset (transitions as float32 tensors); load_expert: demonstrations
  make_env           task -> Gymnasium environment
  evaluate           policy -> metrics of its episodes

Errors that the user can fix raise UserError, which the scripts print as one line (plumbing.run_script).
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

from envs import antmaze, maze2d
from envs.relabelled import Relabelled, relabelled_reward
from plumbing import UserError, file_sha256, write_image

ROOT = Path(__file__).resolve().parent
HOME = ROOT if os.path.expanduser("~") == "~" else Path.home()  # some users have no home directory
BUNDLED = ROOT / "datasets" / "bundled"
GENERATED = Path(os.environ.get("REWIND_DATASETS", HOME / ".rewind" / "datasets"))
D4RL = Path(os.environ.get("D4RL_DATASET_DIR", HOME / ".d4rl" / "datasets"))
D4RL_URL = os.environ.get("REWIND_D4RL_URL", "https://rail.eecs.berkeley.edu/datasets/offline_rl")


# --- tasks ---

ROBOTS = {"halfcheetah": "HalfCheetah-v4", "hopper": "Hopper-v4", "walker2d": "Walker2d-v4", "ant": "Ant-v4"}
RELABELLED = {"jump": "halfcheetah", "angle": "ant"}  # the agent that collected the data had another reward
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
# Widths of observations and actions.
WIDTHS = dict(halfcheetah=(17, 6), hopper=(11, 3), walker2d=(17, 6), ant=(27, 8), maze2d=(4, 2), antmaze=(29, 8))
WORLDS = {"maze2d": maze2d, "antmaze": antmaze}  # domain -> module of its environments and pictures
# First digits of the official files' sha256, in the order of _d4rl_tasks (tensorflow/datasets, checksums.tsv).
SHA256 = {
    "halfcheetah": "25407aef85b5d16c 41324e8487a9556d 48d494a4770c11f4 015db75dae5bbe8e d9fe53bb994eb1e2",
    "hopper": "63103ef7059db4c0 5bdf1bc4a713c829 e121c5f7c9857a30 9d51ad87f8c905be 01aa219a5f8eea5e",
    "walker2d": "4e863bb6090cf4a4 cf00f43add04c17f e75de96a4f77acf7 6b8d7f868c45bbae 2985dc3d436a8baa",
    "ant": "93cc10893eed2b8e 461c03b9f70f40d6 844c4e5743ef5109 8cfb64e62d8944b5 fa22531ca79ea051",
    "antmaze": "5ef15257771c50ef c771dd63963cd7d9 - ad9dcbac05d1f874 6d353df245782992 84f775eb7956ea9c",
    "ant_policy": "692d3869a4a213cd1db141fcf147fe2cb0ca1969594bab1cc3f44659789f44aa",
}
MINARI_ID = re.compile(r"([\w-]+/)*[\w-]+-v\d+")


@dataclass(frozen=True)
class Task:
    id: str  # D4RL id with its version, or Minari id
    domain: str  # halfcheetah, hopper, walker2d, ant, maze2d, antmaze; "": Minari, other environment
    kind: str  # what follows the domain: medium-replay, umaze-dense, large-play, ...
    reference: tuple[float, float] | None  # return of a random and of an expert policy
    max_steps: int = 1000
    sources: tuple[str, ...] = ()  # what --dataset auto tries, in this order; (): a Minari dataset
    file: str = ""  # path of the official file on the server
    sha256: str = ""  # its first digits, if known
    env_spec: str = ""  # evaluation environment of a Minari dataset, as JSON

    @property
    def name(self):
        return f"{self.domain}-{self.kind}"

    @property
    def slug(self):
        """First part of a run's name."""
        return self.id.replace("/", "-")


def _d4rl_tasks():
    tasks = {}

    def add(domain, kind, version, reference, file, sha256=""):
        id = f"{domain}-{kind}-{version}"
        steps = WORLDS[domain].MAX_STEPS[kind.split("-")[0]] if domain in WORLDS else 1000
        sources = ("d4rl", "bundled", "generated") if file else ("generated",)
        tasks[id] = Task(id, domain, kind, reference, steps, sources, file, sha256.strip("-"))

    for robot in ROBOTS:
        kinds = ("random", "medium", "medium-replay", "medium-expert", "expert")
        for kind, sha256 in zip(kinds, SHA256[robot].split(), strict=True):
            file = f"gym_mujoco_v2/{robot}_{kind.replace('-', '_')}-v2.hdf5"
            add(robot, kind, "v2", REFERENCE[robot], file, sha256)
    for maze in ("umaze", "medium", "large"):
        for kind, reward in ((maze, "sparse"), (f"{maze}-dense", "dense")):
            add("maze2d", kind, "v1", REFERENCE[f"maze2d-{kind}"], f"maze2d/maze2d-{maze}-{reward}-v1.hdf5")
    antmazes = (
        ("umaze", "u-maze", False, False),
        ("umaze-diverse", "u-maze", True, True),
        ("medium-play", "big-maze", True, False),
        ("medium-diverse", "big-maze", True, True),
        ("large-play", "hardest-maze", True, False),
        ("large-diverse", "hardest-maze", True, True),
    )
    for (kind, maze, start, goal), sha256 in zip(antmazes, SHA256["antmaze"].split(), strict=True):
        stem = f"Ant_maze_{maze}_noisy_multistart_{start}_multigoal_{goal}_sparse"
        add("antmaze", kind, "v0", REFERENCE["antmaze"], f"ant_maze_new/{stem}.hdf5")
        add("antmaze", kind, "v2", REFERENCE["antmaze"], f"ant_maze_v2/{stem}_fixed.hdf5", sha256)
    for kind, robot in RELABELLED.items():  # MOPO's tasks, which have no official data
        add(robot, kind, "v1", None, "")
    return tasks


TASKS = _d4rl_tasks()


def parse_task(name):
    """Task of a D4RL name (`hopper-medium-replay`, also with version) or of a Minari id (`mujoco/hopper/medium-v0`)."""
    for candidate in (name, f"{name}-v2", f"{name}-v1"):  # the versions that papers use: v2, for maze2d v1
        if candidate in TASKS:
            return TASKS[candidate]
    ours = name.startswith("Rewind/")  # the environments of envs/
    if MINARI_ID.fullmatch(name) and not ours and ("/" in name or _minari_is_local(name)):
        return _minari_task(name)
    names = sorted({task.name for task in TASKS.values()})
    near = difflib.get_close_matches(re.sub(r"-v\d$", "", name.removeprefix("Rewind/").lower()), names, 3, 0.5)
    what = "is an environment, not a dataset" if ours or name in gymnasium.registry else "is not a known task"
    hint = f"did you mean {', '.join(near)}?" if near else "use a D4RL name like hopper-medium-replay or a Minari id"
    raise UserError(f"--env {name} {what}; {hint}")


def normalized_score(task, returns):
    """D4RL's score, 0 for a random policy and 100 for an expert; None if the task has no reference scores."""
    if task.reference is None:
        return None
    low, high = task.reference
    return 100.0 * (returns - low) / (high - low)


# --- data ---


@dataclass
class Dataset:
    """Transitions in recorded order, float32 tensors on the CPU."""

    obs: torch.Tensor  # (N, O)
    act: torch.Tensor  # (N, A), within [-1, 1]
    rew: torch.Tensor  # (N,)
    next_obs: torch.Tensor  # (N, O)
    terminated: torch.Tensor  # (N,) 1 where the MDP ended; 0 at time limits
    has_next: torch.Tensor  # (N,) bool; False: next_obs is unknown (a copy of obs), no model may train on it
    trajectory: torch.Tensor  # (N,) int64, number of the trajectory segment
    id: str = ""
    source: str = ""  # d4rl, bundled, generated, minari or file
    sha256: str = ""
    path: str = ""
    more_facts: dict = field(default_factory=dict)  # in addition to facts(), such as the demonstrations used with it

    def __len__(self):
        return len(self.rew)

    def trajectory_returns(self):
        """(N,) float64: undiscounted return of each row's trajectory."""
        sums = torch.zeros(int(self.trajectory[-1]) + 1, dtype=torch.float64)
        return sums.index_add_(0, self.trajectory, self.rew.double())[self.trajectory]

    def goal(self):
        """Goal of an antmaze, (2,): the middle of all rewarded positions, which lie within 0.5 of it."""
        reached = self.next_obs[self.terminated > 0, :2]
        if not len(reached):
            raise UserError("--dataset: none of its rows reaches the goal, so rollouts need --no-imagined-ends")
        return (reached.amax(0) + reached.amin(0)) / 2

    def facts(self):
        """Entries of config.json and result.json about the data."""
        return {"id": self.id, "source": self.source, "sha256": self.sha256, "transitions": len(self)} | self.more_facts


def pack(obs, act, rew, next_obs, terminated):
    """Transitions as rows of one matrix, so that sampling is one index operation: (B, 2 O + A + 2)"""
    return torch.cat([obs, act, rew[:, None], next_obs, terminated[:, None].float()], -1)


def unpack(rows, obs_dim, act_dim):
    obs, act, rew, next_obs, terminated = rows.split([obs_dim, act_dim, 1, obs_dim, 1], -1)
    return obs, act, rew.squeeze(-1), next_obs, terminated.squeeze(-1)


def load_dataset(task, source="auto", rewards=True):
    """Dataset of `task` from `source`: auto, d4rl, bundled, generated, a Minari id, or the path of an HDF5 file in D4RL
    layout. rewards: if False, a file may lack them; `rew` is then 0.

    Episode ends: a terminal row does not bootstrap (terminated = 1), a time limit does; a row that is both is terminal.
    A row's successor is its entry in `next_observations`, if the file has them, else the next row of its episode.
    Without them an episode's last row has no known successor: a terminal one is kept for Q-learning (has_next is
    False), any other is dropped, as in D4RL's qlearning_dataset. Terminal rows of D4RL's antmazes have a successor,
    since the ant ran on while the data were recorded; rows at its time limits are dropped.
    """
    kind, path = _find(task, source)
    if kind == "minari":
        data = _read_minari(path)
    else:
        sha256 = file_sha256(path)  # first: HDF5 would report an unreadable file as damaged
        data = _read_hdf5(Path(path), task, rewards, ours=kind == "generated")
        data.id, data.sha256 = task.id if kind == "d4rl" else Path(path).stem, sha256
    data.source, data.path = kind, str(path)
    if task.sources:
        _check_widths(data, WIDTHS[task.domain], task.id)
    elif path != task.id:  # a file for the environment of a Minari dataset
        spec = _minari(task.id).spec
        _check_widths(data, [gymnasium.spaces.flatdim(s) for s in (spec.observation_space, spec.action_space)], task.id)
    if task.kind in RELABELLED and rewards:
        act, next_obs, rew = (x[data.has_next].double().numpy() for x in (data.act, data.next_obs, data.rew))
        if not np.allclose(relabelled_reward(task.kind, act, next_obs), rew, atol=1e-2):
            wanted = "write envs.relabelled.relabelled_reward of its rows into them"
            raise UserError(f"{path}: its rewards are not those of {task.id}; {wanted}")
    return data


def _check_widths(data, widths, whose):
    for name, x, want in zip(("observations", "actions"), (data.obs, data.act), widths, strict=True):
        if x.shape[1] != want:
            it = "is it a file of another task?"
            raise UserError(f"{data.path}: {name} have {x.shape[1]} entries, {whose} has {want}; {it}")


def load_expert(task, source, trajectories, data):
    """Demonstrations to go with `data`, whose facts then name them: the first `trajectories` of `source`.

    auto: the robot's expert data, wherever load_dataset finds them, or on maze2d our planner's episodes to the task's
    goal, generated on first use. An .npz file with the arrays of D4RL's layout is also accepted.
    """
    maze = task.domain == "maze2d"
    try:
        if maze and source in ("auto", "generated"):
            path = GENERATED / f"maze2d_{task.kind.replace('-', '_')}_expert.hdf5"
            if not path.exists():
                _generate(task, path, "--expert")
            expert = replace(load_dataset(task, str(path), rewards=False), source="generated")
        elif source not in ("auto", "d4rl", "bundled", "generated"):
            expert = load_dataset(task, source, rewards=False)
        elif task.domain in ROBOTS and task.file:
            expert = load_dataset(TASKS[f"{task.domain}-expert-v2"], source, rewards=False)
        else:
            give = f"give {'auto, ' * maze}a Minari id or the path of a file"
            raise UserError(f"--dataset {source}: there are no demonstrations for {task.id}; {give}")
    except UserError as e:
        raise UserError(str(e).replace("--dataset", "--expert-dataset"), e.status) from None
    _check_widths(expert, (data.obs.shape[1], data.act.shape[1]), data.path)
    if (have := int(expert.trajectory[-1]) + 1) < trajectories:
        raise UserError(f"--expert-trajectories {trajectories}: {expert.path} has {have}")
    rows = expert.trajectory < trajectories
    columns = {f.name: getattr(expert, f.name)[rows] for f in fields(expert) if f.type is torch.Tensor}
    expert = replace(expert, **columns)
    data.more_facts = {"expert": expert.facts() | {"trajectories": trajectories}}
    return expert


def _find(task, source):
    """(kind, path or Minari id) of the dataset; `auto` prints which one it took."""
    stem, file = f"{task.domain}_{task.kind.replace('-', '_')}.hdf5", Path(task.file).name
    places = {"d4rl": D4RL / file, "bundled": BUNDLED / stem, "generated": GENERATED / stem}
    if source not in ("auto", *places):
        path = Path(os.path.expanduser(source))
        if path.is_file():
            return "file", path
        if path.exists() or path.suffix in (".hdf5", ".h5"):
            what = "is a folder" if path.is_dir() else "no such file"
            raise UserError(f"--dataset {source}: {what}; give the path of an HDF5 file")
        if MINARI_ID.fullmatch(source):
            return "minari", source
        raise UserError(f"--dataset {source} is not a file, a Minari id or one of auto, {', '.join(places)}")
    if not task.sources:
        if source == "auto":
            return "minari", task.id
        raise UserError(f"--dataset {source}: {task.id} is a Minari dataset; use --dataset auto")
    scripts = {"maze2d": f"maze2d.py --maze {task.kind.split('-')[0]}", "antmaze": f"antmaze.py --task {task.kind}"}
    scripts |= {robot: f"mujoco.py --env {robot} --kinds {task.kind}" for robot in ROBOTS}
    how = {
        "d4rl": f"put {file} in {D4RL}, or connect to the internet",
        "bundled": f"only hopper-medium-replay ships with the repository, in {BUNDLED}",
        "generated": f"generate it with: python datasets/{scripts[task.domain]}",
    }
    if source not in ("auto", *task.sources):
        only = ", ".join(task.sources)
        raise UserError(f"--dataset {source}: {task.id} exists as {only} data only; {how['generated']}")
    tried, why = task.sources if source == "auto" else (source,), []
    for kind in tried:
        path = places[kind]
        if kind == "d4rl" and not os.path.exists(path):
            try:
                download(f"{D4RL_URL}/{task.file}", path, task.sha256)
            except UserError as e:
                why.append(str(e))
        if kind == "generated" and task.domain in ("maze2d", "antmaze") and not path.exists():
            try:
                _generate(task, path)
            except UserError as e:
                why.append(str(e))
        if os.path.exists(path):
            if source == "auto":
                print(f"data: {kind} {path.name}" + (f" ({'; '.join(why)})" if why else ""), file=sys.stderr)
            return kind, path
    why = "; ".join(why + [how[kind] for kind in tried])
    raise UserError(f"--dataset {source}: no data for {task.name} ({why}; or give the path of an HDF5 file)")


def _generate(task, path, *flags):
    """Generates a maze's data on first use: maze2d in minutes, antmaze in ten. An interrupt also ends the child."""
    what = ["--task", task.kind] if task.domain == "antmaze" else ["--maze", task.kind.split("-")[0]]
    if task.domain == "antmaze":
        ant_policy()
    print(f"data: generating {path.name} with datasets/{task.domain}.py", file=sys.stderr)
    script = ROOT / "datasets" / f"{task.domain}.py"
    if subprocess.run([sys.executable, script, *what, "--out", path.parent, *flags]).returncode:
        raise UserError(f"datasets/{task.domain}.py could not generate {path}")


def ant_policy():
    """Path of D4RL's goal-reaching ant, which collects the antmaze data; downloaded if missing."""
    path = D4RL / "ant_hierarch_pol.pkl"
    if not path.exists():
        try:
            download(f"{D4RL_URL}/{path.name}", path, SHA256["ant_policy"])
        except UserError as e:
            raise UserError(f"{e}; put D4RL's {path.name}, the ant that collects the data, in {D4RL}") from None
    if file_sha256(path) != SHA256["ant_policy"]:
        raise UserError(f"{path} is not D4RL's file (sha256 {SHA256['ant_policy'][:16]}...)")
    return path


def download(url, path, sha256="", timeout=10):
    """Download `url` to `path`, which appears only when it is complete and its sha256 starts with `sha256`."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=timeout) as response, open(part, "wb") as f:
            size, digest = int(response.headers.get("Content-Length") or 0), hashlib.sha256()
            with tqdm(total=size or None, desc=path.name, unit="B", unit_scale=True) as bar:
                while chunk := response.read(1 << 20):
                    f.write(chunk)
                    digest.update(chunk)
                    bar.update(len(chunk))
            if size and f.tell() != size:
                raise UserError(f"{url}: got {f.tell()} of {size} bytes; run again to retry")
        if not digest.hexdigest().startswith(sha256):
            have = digest.hexdigest()[:16]
            raise UserError(f"{url}: sha256 {have} is not {sha256}; the server's file has changed")
        os.replace(part, path)
    except (OSError, http.client.HTTPException, ValueError) as e:
        raise UserError(f"cannot download {url}: {getattr(e, 'reason', e)}") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


# D4RL's arrays and their dimensions.
LAYOUT = dict(observations=2, actions=2, rewards=1, terminals=1, timeouts=1, next_observations=2)


def _open(path):
    """The HDF5 file; arrays of an .npz file as an HDF5 file in memory."""
    try:
        if path.suffix != ".npz":
            return h5py.File(path, "r")
        f = h5py.File(io.BytesIO(), "w")
        with np.load(path) as arrays:  # without unpickling
            for key in LAYOUT.keys() & set(arrays.files):
                f[key] = arrays[key]
        return f
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as e:
        kind = "npz" if path.suffix == ".npz" else "HDF5"
        raise UserError(f"{path}: cannot be read as {kind} ({str(e)[:80]}); is the file complete?") from None


def _read_array(f, key, required, bad):
    """Array of an open HDF5 file, float32 or bool; None if it has none."""
    ndim, dtype = LAYOUT[key], bool if key in ("terminals", "timeouts") else np.float32
    try:
        if f.get(key, getlink=True) is None:
            if required:
                layout = "D4RL layout needs observations, actions, rewards, terminals"
                raise UserError(f"{bad}has no array '{key}'; {layout}")
            return None
        array = f[key]
        if not isinstance(array, h5py.Dataset) or array.dtype.kind not in "fiub":
            raise UserError(f"{bad}'{key}' does not hold numbers")
        if array.file != f or array.is_virtual or array.external:  # may change, and reads as 0 where it is missing
            raise UserError(f"{bad}'{key}' lies in other files (link, virtual or external data); copy it into this one")
        shape = array.shape or ()
        if len(shape) == 2 and ndim == 1 and shape[1] == 1:  # (N, 1) is common for rewards
            shape = shape[:1]
        if len(shape) != ndim:
            raise UserError(f"{bad}'{key}' has shape {array.shape}, expected {ndim} dimension{'s'[: ndim - 1]}")
        out = np.empty(array.shape, array.dtype if dtype is bool else dtype)  # HDF5 cannot convert float flags to bool
        if out.size:
            array.read_direct(out)  # converts while reading: no second copy in the file's precision
    except (OSError, KeyError, RuntimeError, ValueError, MemoryError) as e:  # what h5py raises for damaged files
        raise UserError(f"{bad}'{key}' cannot be read ({str(e)[:80]}); is the file complete?") from None
    if dtype is bool and not ((out == 0) | (out == 1)).all():
        raise UserError(f"{bad}'{key}' holds values other than 0 and 1")
    out = out.reshape(shape).astype(dtype, copy=False)
    if dtype is np.float32 and not np.isfinite(out).all():
        row = np.flatnonzero(~np.isfinite(out.reshape(len(out), -1)).all(1))[0]
        raise UserError(f"{bad}'{key}' holds NaN or inf in row {row}")
    return out


def _read_hdf5(path, task, rewards=True, ours=False):
    bad = f"{path}: "
    with _open(path) as f:
        needed = ("observations", "actions", "terminals") + ("rewards",) * rewards
        arrays = {k: _read_array(f, k, k in needed, bad) for k in LAYOUT}
    lengths = {k: len(v) for k, v in arrays.items() if v is not None}
    if len(set(lengths.values())) > 1:
        raise UserError(f"{bad}arrays differ in length: {lengths}")
    obs, act, rew, terminals, timeouts, next_obs = arrays.values()
    rew = np.zeros(len(obs), np.float32) if rew is None else rew
    if not (obs.size and act.size):
        raise UserError(f"{bad}is empty")
    if next_obs is not None and next_obs.shape != obs.shape:
        raise UserError(f"{bad}next_observations have {next_obs.shape[1]} entries, observations {obs.shape[1]}")
    if task.domain == "ant" and obs.shape[1] == 111:  # D4RL's contact forces are zero; Ant-v4 has none
        obs = np.ascontiguousarray(obs[:, :27])
        next_obs = None if next_obs is None else np.ascontiguousarray(next_obs[:, :27])
    if task.domain == "maze2d" and (~obs.any(1)).any():
        defect = "the known defect of maze2d files from before December 2020; get the current file"
        raise UserError(f"{bad}has all-zero observations, {defect}")
    if timeouts is None:  # successors show where episodes end
        timeouts = _timeouts_from_horizon(terminals, task.max_steps) if next_obs is None else np.zeros_like(terminals)
    go_on = False
    if task.domain == "antmaze":
        jump = np.linalg.norm(np.diff(obs[:, :2], axis=0), axis=1)
        resets = jump > 10 * jump.mean()  # ROMI's rule
        # D4RL's recordings continue past the goal: the row after a terminal one is its successor. Every rewarded row is
        # terminal, so without terminal rows a model would never see a reward.
        go_on = (resets & terminals[:-1]).sum() < terminals.sum() / 2
        if task.id.endswith("-v0") and not ours:  # D4RL's timeouts do not match the resets
            timeouts = np.r_[resets, True]
    return _from_arrays(obs, act, rew, next_obs, terminals, timeouts, bad, terminals_go_on=go_on)


def _timeouts_from_horizon(terminals, max_steps):
    """For files without timeouts, as D4RL's scripts may write: episodes end at terminals or the task's time limit."""
    timeouts, begin = np.zeros_like(terminals), 0
    for end in np.r_[np.flatnonzero(terminals), len(terminals) - 1]:
        timeouts[begin + max_steps - 1 : end + 1 : max_steps] = True
        begin = end + 1
    return timeouts & ~terminals


def _from_arrays(obs, act, rew, next_obs, terminals, timeouts, bad, terminals_go_on=False):
    if (most := np.abs(act).max()) > 1 + 1e-4:
        raise UserError(f"{bad}actions reach {most:.4g}, outside [-1, 1]; rescale them to the action box")
    np.clip(act, -1, 1, out=act)
    ends = terminals | timeouts
    if next_obs is not None:
        # Some files do not mark time limits: a row whose successor is not the next row ends a trajectory.
        step = 1e-4 * (1 + np.abs(obs).max(0))
        ends[:-1] |= (np.abs(next_obs[:-1] - obs[1:]) > step).any(1)
    if next_obs is None and not ends.any():
        raise UserError(f"{bad}holds no complete episode: neither terminals nor timeouts mark an end")
    keep = has_next = np.ones(len(rew), bool)
    if next_obs is None:
        ends[-1] = True  # the last row ends a trajectory, too, and has no successor
        unknown = timeouts if terminals_go_on else ends
        unknown[-1] = True
        has_next = ~unknown
        keep = has_next if terminals_go_on else has_next | terminals
        next_obs = np.empty_like(obs)
        next_obs[:-1] = obs[1:]
        next_obs[unknown] = obs[unknown]
    if not keep.any():
        raise UserError(f"{bad}holds no complete transition")
    trajectory = np.r_[0, np.cumsum(ends[:-1])]
    arrays = [obs, act, rew, next_obs, terminals.astype(np.float32), has_next, trajectory]
    del obs, act, rew, next_obs
    if not keep.all():
        for i in range(len(arrays)):  # one at a time, to avoid a second copy of everything
            arrays[i] = arrays[i][keep]
        arrays[-1] = np.unique(arrays[-1], return_inverse=True)[1]
    return Dataset(*(torch.from_numpy(np.ascontiguousarray(x)) for x in arrays))


# --- Minari ---


def _minari_is_local(dataset_id):
    root = Path(os.environ.get("MINARI_DATASETS_PATH", HOME / ".minari" / "datasets"))
    return (root / dataset_id / "data" / "metadata.json").exists()


def _minari(dataset_id):
    """The Minari dataset, downloaded if missing."""
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    import minari

    local = _minari_is_local(dataset_id)
    try:
        if not (local or os.environ.get("HF_HUB_OFFLINE")):  # without a network the client retries for 30 s
            hosts = {"hf": "https://huggingface.co", "gcp": "https://storage.googleapis.com"}
            host = os.environ.get("HF_ENDPOINT") or hosts[os.environ.get("MINARI_REMOTE", "hf").split(":")[0]]
            with contextlib.suppress(urllib.error.HTTPError):  # any answer will do
                urllib.request.urlopen(host, timeout=5).close()
        return minari.load_dataset(dataset_id, download=not local)
    except Exception as e:  # HTTP libraries' errors share no base class
        message = f"Minari dataset {dataset_id} is not available ({type(e).__name__}: {str(e)[:100]})"
        raise UserError(f"{message}; see `minari list remote`, or download it on a machine with a network") from None


def _minari_task(dataset_id):
    data = _minari(dataset_id)
    facts = data.storage.metadata
    spec = facts.get("eval_env_spec") or facts.get("env_spec") or ""
    spec_facts = json.loads(spec) if spec else {"id": "", "max_episode_steps": 1000}
    env, limit = spec_facts["id"], spec_facts["max_episode_steps"]
    if not limit:
        episodes = data.storage.get_episode_metadata(range(data.total_episodes))
        limit = max((int(e["total_steps"]) for e in episodes), default=1000)
        print(f"note: {env} has no time limit; evaluations use the longest episode's length, {limit}", file=sys.stderr)
    robots = {gym_id.split("-")[0]: robot for robot, gym_id in ROBOTS.items()}
    domain, kind = robots.get(env.split("-")[0], ""), dataset_id.split("/")[-1]
    if env.startswith("Rewind/Maze2d-"):  # of datasets/maze2d.py
        domain, kind = "maze2d", env.removeprefix("Rewind/Maze2d-").removesuffix("-v1")
    if env.startswith("Rewind/AntMaze-"):  # of datasets/antmaze.py
        domain, kind = "antmaze", env.removeprefix("Rewind/AntMaze-").removesuffix("-v2")
    low, high = facts.get("ref_min_score"), facts.get("ref_max_score")
    return Task(dataset_id, domain, kind, None if high is None else (low, high), limit, env_spec=spec)


def _read_minari(dataset_id):
    """Rows of all episodes, cached as flat arrays: Minari takes seconds to read 1000 episodes."""
    data, names = _minari(dataset_id), ("obs", "act", "rew", "next_obs", "terminals", "timeouts")
    digest = hashlib.sha256()
    for file in sorted(p for p in Path(data.storage.data_path).rglob("*") if p.is_file()):
        digest.update(bytes.fromhex(file_sha256(file)))
    sha256, bad = digest.hexdigest(), f"Minari dataset {dataset_id}: "
    cache = GENERATED / "cache" / f"{sha256}.npz"
    try:
        with np.load(cache) as arrays:
            flat = [arrays[k] for k in names]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # missing or damaged
        flat = _flat_minari(data, bad)
        with contextlib.suppress(OSError):  # without a cache the next start is slower
            cache.parent.mkdir(parents=True, exist_ok=True)
            part = cache.with_suffix(f".{os.getpid()}.part.npz")
            np.savez(part, **dict(zip(names, flat, strict=True)))
            os.replace(part, cache)
    out = _from_arrays(*flat, bad)
    out.id, out.sha256 = dataset_id, sha256
    return out


def _flat_minari(data, bad):
    for name, space in (("observations", data.spec.observation_space), ("actions", data.spec.action_space)):
        if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1:
            need = f"these algorithms need a vector of continuous {name}"
            raise UserError(f"{bad}its {name} are {str(space)[:80]}; {need}")
    rows, episodes = [], data.iterate_episodes()
    try:
        for episode in tqdm(episodes, total=data.total_episodes, desc=bad, unit="episode", leave=False):
            obs, end = episode.observations, np.zeros(len(episode.rewards), bool)
            end[-1] = True  # an episode's last row ends a trajectory, whatever its flags say
            terminal, timeout = episode.terminations, end & ~episode.terminations
            rows.append((obs[:-1], episode.actions, episode.rewards, obs[1:], terminal, timeout))
    except (OSError, KeyError, RuntimeError, ValueError) as e:  # a damaged file
        raise UserError(f"{bad}cannot be read ({str(e)[:80]}); record or download it again") from None
    if not rows:
        raise UserError(f"{bad}is empty")
    dtypes = (np.float32,) * 4 + (bool,) * 2
    flat = [np.concatenate(x).astype(dtype) for x, dtype in zip(zip(*rows, strict=True), dtypes, strict=True)]
    low, high = (np.asarray(x, np.float32) for x in (data.spec.action_space.low, data.spec.action_space.high))
    if np.isfinite(low).all() and np.isfinite(high).all():
        flat[1] = (2 * (flat[1] - low) / (high - low) - 1).clip(-1, 1)  # to [-1, 1]; make_env scales back
    for name, x in zip(("observations", "actions", "rewards", "next observations"), flat, strict=False):
        if not np.isfinite(x).all():
            raise UserError(f"{bad}{name} hold NaN or inf")
    return flat


def write_minari(dataset_id, data, env, reference, algorithm, script, facts):
    """Write arrays in D4RL's layout, with `next_observations`, as a Minari dataset, replacing an existing one. Episodes
    end at terminals and timeouts, or where an array `ends` says so. env: a registered id; reference: return of a random
    and of an expert policy."""
    import minari
    from minari.data_collector import EpisodeBuffer
    from minari.storage import get_dataset_path

    shutil.rmtree(get_dataset_path(dataset_id), ignore_errors=True)  # also what a killed run left, which Minari hides
    ended = data["ends"].copy() if "ends" in data else data["terminals"] | data["timeouts"]
    ended[-1] = True
    begin, buffers = 0, []
    for i, end in enumerate(np.flatnonzero(ended) + 1):
        rows = slice(begin, end)
        obs = np.concatenate([data["observations"][rows], data["next_observations"][end - 1 : end]])
        flags = dict(terminations=data["terminals"][rows], truncations=ended[rows] & ~data["terminals"][rows])
        act, rew = data["actions"][rows], data["rewards"][rows]
        buffers.append(EpisodeBuffer(id=i, observations=obs, actions=act, rewards=rew, **flags))
        begin = end
    widths = (data[k].shape[1:] for k in ("observations", "actions"))
    spaces = [gymnasium.spaces.Box(-k, k, width, np.float32) for k, width in zip((np.inf, 1), widths, strict=True)]
    about = {"algorithm_name": algorithm, "code_permalink": script, "description": json.dumps(facts)}
    about |= {"author": "Rewind", "author_email": "none", "ref_min_score": reference[0], "ref_max_score": reference[1]}
    about |= {"observation_space": spaces[0], "action_space": spaces[1], "env": env, "eval_env": env}
    minari.create_dataset_from_buffers(dataset_id, buffers, **about)
    print(f"Minari dataset {dataset_id}: {len(buffers)} episodes", file=sys.stderr)


# --- evaluation ---


def make_env(task):
    """Evaluation environment of a Task, or of a robot's name; actions in [-1, 1].

    The robots are Gymnasium's v4, the closest to D4RL's v2. Since MuJoCo 3.5 the contact margins of two geoms add up,
    where before the larger one counted, so hopper and ant touch the ground earlier; halving all margins restores the
    old physics (one-step errors against MuJoCo 2.2.0: tests/test_utils.py).
    """
    task = TASKS[f"{task}-medium-v2"] if isinstance(task, str) else task
    if task.domain == "maze2d":
        return gymnasium.make(f"Rewind/Maze2d-{task.kind}-v1")
    if task.domain == "antmaze":  # also for v0, whose environment kept one goal
        return gymnasium.make(f"Rewind/AntMaze-{task.kind}-v2")
    ours = task.domain in ROBOTS and task.id.startswith("rewind/")  # Minari cannot store corrected margins
    handler = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(lambda message: None)  # halfcheetah's XML uses a deprecated keyword
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is out of date.*")
            if not (task.sources or ours):
                return _minari_env(task)
            env = gymnasium.make(ROBOTS[task.domain])
    finally:
        mujoco.set_mju_user_warning(handler)
    version = tuple(int(n) for n in mujoco.__version__.split(".")[:2])
    if task.domain in ("hopper", "ant") and version >= (3, 5):
        env.unwrapped.model.geom_margin[:] *= 0.5
    return Relabelled(env, task.kind) if task.kind in RELABELLED else env


def _minari_env(task):
    """The environment stored with a Minari dataset, unchanged: scores are for that dataset, not for a D4RL task."""
    try:
        spec = gymnasium.envs.registration.EnvSpec.from_json(task.env_spec)
        spec.max_episode_steps = spec.max_episode_steps or task.max_steps  # else an episode may never end
        env = gymnasium.make(spec)
    except Exception as e:
        why = f"{type(e).__name__}: {str(e)[:100]}" if task.env_spec else "none is stored with it"
        raise UserError(f"--env {task.id}: no evaluation environment ({why}); use --eval-episodes 0") from None
    space = env.action_space
    if not isinstance(space, gymnasium.spaces.Box):
        raise UserError(f"--env {task.id}: actions are {space}; these algorithms need continuous actions")
    if np.isfinite(space.low).all() and np.isfinite(space.high).all():
        middle, half = (space.high / 2 + space.low / 2), (space.high / 2 - space.low / 2)

        def to_box(act):
            act = np.clip(middle + half * act, space.low, space.high)
            return (np.rint(act) if space.dtype.kind in "iu" else act).astype(space.dtype)

        env = gymnasium.wrappers.TransformAction(env, to_box, gymnasium.spaces.Box(-1, 1, space.shape, np.float32))
    return env


@torch.no_grad()
def rollout(envs, act, seed):
    """One episode per environment, all stepped together; act: obs (B, O) tensor -> actions (B, A).

    Episode i is seeded with seed + i. Returns lists of observations, (T+1, O) float32 each, and of rewards, (T,) each.
    torch is seeded, too, for `act`; the caller's random state is restored.
    """
    seen = [[np.asarray(env.reset(seed=seed + i)[0], np.float32)] for i, env in enumerate(envs)]
    rewards, alive = [[] for _ in envs], list(range(len(envs)))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        while alive:
            actions = np.asarray(act(torch.from_numpy(np.stack([seen[i][-1] for i in alive]))))
            if not np.isfinite(actions).all():
                raise UserError("actions are not finite: the policy diverged", status=3)
            for i, action in zip(alive[:], actions, strict=True):
                obs, rew, terminated, truncated, _ = envs[i].step(action)
                seen[i].append(np.asarray(obs, np.float32))
                rewards[i].append(rew)
                if terminated or truncated:
                    alive.remove(i)
    return [np.stack(s) for s in seen], [np.array(r, float) for r in rewards]


def evaluate(task, envs, act, seed, gamma, folder=None, episodes=None):
    """Metrics of one episode in each of `envs`, seeded apart from training; on mazes also <folder>/execution.png.

    A list given as `episodes` receives the observations of every episode, (T+1, O) each. The discounted return is
    comparable with Q values.
    """
    seen, rewards = rollout(envs, act, 1000 * seed + 100)
    returns = np.array([r.sum() for r in rewards])
    draw_maze(task, seen, folder, "execution")
    if episodes is not None:
        episodes.extend(seen)
    return {
        "eval/return": returns.mean().item(),
        "eval/return_std": returns.std().item(),
        "eval/length": float(np.mean([len(r) for r in rewards])),
        "eval/normalized_score": normalized_score(task, returns.mean().item()),
        "eval/discounted_return": float(np.mean([r @ gamma ** np.arange(len(r)) for r in rewards])),
    }


def draw_maze(task, trajectories, folder, name):
    """On mazes: top view of up to 100 trajectories, (T, O) each, as <folder>/<name>.png."""
    if folder is not None and task.domain in WORLDS:
        image = WORLDS[task.domain].view_trajectories(task.kind.split("-")[0], trajectories[:100])
        write_image(folder / f"{name}.png", image)


def check_ends(terminates, domain, data):
    """Check the termination rule for rollouts against the recorded terminals; the environment may be a variant."""
    rows = data.has_next
    ended = terminates(data.obs[rows], data.act[rows], data.next_obs[rows])
    share = (ended != (data.terminated[rows] > 0)).float().mean().item()
    how = "use --no-imagined-ends for rollouts without ends, or write the data's rule into termination_fn"
    wrong = f"{data.path}: the termination rule of {domain} is wrong for {share:.1%} of its rows"
    if not share > 1e-3:  # not `<=`: share is NaN if there are no rows
        return
    if domain == "antmaze":
        print(f"note: {wrong}; the goal is estimated from where the rewarded rows lead", file=sys.stderr)
    elif domain in WIDTHS:
        raise UserError(f"{wrong}; {how}")
    elif not domain:
        print(f"note: no termination rule for {data.id} ({share:.1%} of its rows are terminal); {how}", file=sys.stderr)


def describe_imagination(task, obs, act, rew, next_obs, terminated, chains, folder):
    """Metrics of imagined rows (M, ...); on mazes also errors of some rollouts against the simulator. chains: a list
    of h tuples (obs, act, next_obs), (C, ...) each, in forward time."""
    stats = {f"model/imagined_reward_{k}": v for k, v in (("min", rew.min()), ("max", rew.max()), ("mean", rew.mean()))}
    stats["model/imagined_terminated"] = terminated.mean()
    stats["model/imagined_state_max"] = max(obs.max(), -obs.min(), next_obs.max(), -next_obs.min())
    if task.domain in WORLDS and (n := min(len(step[0]) for step in chains)):
        obs, act, next_obs = (torch.stack([step[k][:n].cpu() for step in chains], 1) for k in range(3))  # (C, h, ...)
        draw_maze(task, torch.cat([obs[:, :1], next_obs], 1).numpy(), folder, "imagination")
        steps = (x.double().numpy() for x in (obs, act, next_obs))
        one, all_steps = WORLDS[task.domain].replay_error(task.kind.split("-")[0], *steps)
        stats |= {"model/replay_error_1": one, f"model/replay_error_{len(chains)}": all_steps}
    return stats


def describe_augmentation(task, expert, supplementary, obs, act, next_obs, unscale, folder, step):
    """Metrics of imagined rows after `step` updates: obs, act, next_obs (M, ...), normalised like the expert and
    supplementary states, (N, O) each; unscale reverts that. On maze2d also the error of some 500 rows in the simulator,
    the share at rest, and a picture of all these states: <folder>/augmentation_<step>.png."""

    def some(x, n):
        return x[:: max(1, len(x) // n)]

    stats = {"model/distance_to_expert": torch.cdist(some(obs, 2_000), some(expert, 10_000)).amin(1).median()}
    if task.domain == "maze2d":
        maze = task.kind.split("-")[0]
        groups = {"expert": expert, "supplementary": supplementary, f"imagined after {step} updates": obs}
        groups = {k: unscale(some(x, 5_000)).cpu().numpy() for k, x in groups.items()}
        write_image(folder / f"augmentation_{step}.png", maze2d.view_states(maze, groups))
        steps = (unscale(some(obs, 500)), some(act, 500), unscale(some(next_obs, 500)))  # chains of one step
        steps = (x[:, None].double().cpu().numpy() for x in steps)
        stats["model/replay_error_1"] = maze2d.replay_error(maze, *steps)[0]
        stats["model/imagined_at_rest"] = (unscale(obs)[:, 2:].norm(dim=1) < 0.1).float().mean()
    return stats
