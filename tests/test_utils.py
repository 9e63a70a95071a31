"""utils.py: task names, what the loader makes of files, downloads, Minari, environments, evaluation."""

import hashlib
import os
import pickle
import signal
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import h5py
import minari
import mujoco
import numpy as np
import pytest
import torch
from conftest import NOWHERE, ROOT
from minari.data_collector import EpisodeBuffer

import utils
from utils import TASKS, UserError, evaluate, load_dataset, load_expert, make_env, normalized_score, parse_task, rollout

REFERENCE_STEPS = ROOT.parent / "shared" / "data" / "mujoco_reference.npz"
if not REFERENCE_STEPS.exists():
    REFERENCE_STEPS = Path(__file__).with_name("mujoco_2_steps.npz")  # 80 of its 500 rows a robot
HOPPER, MAZE = parse_task("hopper-medium-replay"), parse_task("maze2d-umaze")
GOOD = [(4, "terminal"), (3, "timeout"), (4, "terminal")]


def recorded(episodes, obs_dim=11, act_dim=3, next_observations=True):
    """Arrays of a D4RL file. Episode e visits 100 e + 1, 100 e + 2, ..., each repeated obs_dim times; rewards count."""
    state = np.concatenate([100 * e + 1 + np.arange(length) for e, (length, _) in enumerate(episodes)])
    end = np.concatenate([[""] * (length - 1) + [end] for length, end in episodes])
    data = {
        "observations": np.tile(state[:, None], obs_dim).astype(np.float32),
        "actions": np.random.default_rng(0).uniform(-1, 1, (len(state), act_dim)).astype(np.float32),
        "rewards": np.arange(1, len(state) + 1, dtype=np.float32),
        "terminals": np.isin(end, ("terminal", "both")),
        "timeouts": np.isin(end, ("timeout", "both")),
    }
    return data | ({"next_observations": data["observations"] + 1} if next_observations else {})


def save(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as f:
        for k, v in data.items():
            f[k] = v
    return path


def load(tmp_path, data, task=HOPPER):
    return load_dataset(task, str(save(tmp_path / "data.hdf5", data)))


def tensors(data):
    return {k: getattr(data, k) for k in ("obs", "act", "rew", "next_obs", "terminated", "has_next", "trajectory")}


def assert_equal(a, b):
    for (k, x), y in zip(tensors(a).items(), tensors(b).values(), strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y), k


def no_pair_crosses(data):
    """Inside an episode of `recorded` the successor is the state plus one; an unknown successor is a copy."""
    return torch.equal(data.next_obs - data.obs, data.has_next[:, None].expand_as(data.obs).float())


# --- task names ---


def expected_tasks():
    """Id, official file, reference scores, horizon, version meant by the bare name: tasks.md, 1.1 to 1.4."""
    gym = {"halfcheetah": (-280.178953, 12135.0), "hopper": (-20.272305, 3234.3)}
    for robot, reference in (gym | {"walker2d": (1.629008, 4592.3), "ant": (-325.6, 3879.7)}).items():
        for kind in ("random", "medium", "medium-replay", "medium-expert", "expert"):
            file = f"gym_mujoco_v2/{robot}_{kind.replace('-', '_')}-v2.hdf5"
            yield f"{robot}-{kind}-v2", file, reference, 1000, "v2"
    for maze, steps, sparse, dense in (
        ("umaze", 300, (23.85, 161.86), (68.537689, 193.66285642381482)),
        ("medium", 600, (13.13, 277.39), (44.264742, 297.4552547777125)),
        ("large", 800, (6.7, 273.99), (30.569041, 303.4857382709002)),
    ):
        yield f"maze2d-{maze}-v1", f"maze2d/maze2d-{maze}-sparse-v1.hdf5", sparse, steps, "v1"
        yield f"maze2d-{maze}-dense-v1", f"maze2d/maze2d-{maze}-dense-v1.hdf5", dense, steps, "v1"
    for kind, maze, start, goal, steps in (
        ("umaze", "u-maze", False, False, 700),
        ("umaze-diverse", "u-maze", True, True, 700),
        ("medium-play", "big-maze", True, False, 1000),
        ("medium-diverse", "big-maze", True, True, 1000),
        ("large-play", "hardest-maze", True, False, 1000),
        ("large-diverse", "hardest-maze", True, True, 1000),
    ):
        stem = f"Ant_maze_{maze}_noisy_multistart_{start}_multigoal_{goal}_sparse"
        yield f"antmaze-{kind}-v0", f"ant_maze_new/{stem}.hdf5", (0, 1), steps, "v2"
        yield f"antmaze-{kind}-v2", f"ant_maze_v2/{stem}_fixed.hdf5", (0, 1), steps, "v2"


def test_d4rl_names():
    for task_id, file, reference, max_steps, version in expected_tasks():
        task = parse_task(task_id)
        assert (task.id, task.file, task.reference, task.max_steps) == (task_id, file, reference, max_steps)
        assert task.name == task_id[:-3] and task.slug == task_id and parse_task(task.name).id[-2:] == version
        assert [normalized_score(task, x) for x in reference] == [0, 100]


def test_there_are_no_other_tasks_and_the_known_checksums_are_theirs():
    ours = {"halfcheetah-jump-v1", "ant-angle-v1"}
    assert set(TASKS) == {task_id for task_id, *_ in expected_tasks()} | ours and len(TASKS) == 20 + 6 + 12 + 2
    known = {"hopper-medium-replay": "e121c5f7c9857a30", "ant-expert": "fa22531ca79ea051", "antmaze-medium-play": ""}
    known |= {"antmaze-umaze": "5ef15257771c50ef", "antmaze-large-play": "6d353df245782992"}
    assert {name: parse_task(name).sha256 for name in known} == known


def test_unknown_task_is_refused_with_a_hint():
    hints = {"hoper-medium-replay": "hopper-medium-replay", "hopper-medium-v0": "hopper-medium", "zzz": "a D4RL name"}
    hints |= {"antmaze-large": "antmaze-large-play", "CartPole-v1": "is an environment", "": "a D4RL name like"}
    hints |= {"Rewind/Maze2d-umaze-v1": "is an environment, not a dataset; did you mean maze2d-umaze"}
    for name, hint in hints.items():
        with pytest.raises(UserError) as e:
            parse_task(name)
        assert hint in str(e.value) and f"--env {name}" in str(e.value)


# --- episode ends ---

# Rows:   0 1 2          3 4           5            6              7              8 9 10
ENDS = [(3, "terminal"), (2, "timeout"), (1, "both"), (1, "timeout"), (1, "terminal"), (3, "none")]


def test_ends_with_next_observations(tmp_path):
    data = load(tmp_path, recorded(ENDS))
    assert data.rew.tolist() == list(range(1, 12))  # no row is lost
    assert data.terminated.nonzero().flatten().tolist() == [2, 5, 7]  # both at once is a terminal, a time limit is none
    assert data.has_next.all() and no_pair_crosses(data)
    assert data.trajectory.tolist() == [0, 0, 0, 1, 1, 2, 3, 4, 5, 5, 5]
    assert data.trajectory_returns().tolist() == [6, 6, 6, 9, 9, 6, 7, 8, 30, 30, 30]


def test_ends_without_next_observations(tmp_path):
    data = load(tmp_path, recorded(ENDS, next_observations=False))
    assert data.rew.tolist() == [1, 2, 3, 4, 6, 8, 9, 10]  # time limits and the fragment's last row have no successor
    assert data.terminated.tolist() == [0, 0, 1, 0, 1, 1, 0, 0]
    assert data.has_next.tolist() == [True, True, False, True, False, False, True, True]
    assert no_pair_crosses(data)
    assert data.trajectory.tolist() == [0, 0, 0, 1, 2, 3, 4, 4]  # the one-step time limit is gone, numbers stay dense
    assert data.trajectory_returns().tolist() == [6, 6, 6, 4, 6, 8, 19, 19]


def test_dtypes_and_facts(tmp_path):
    file = recorded(GOOD)
    file["actions"][2, 1] = 1.00005  # rounding of somebody's rescaling, not an error
    data = load(tmp_path, file)
    dtypes = dict.fromkeys(tensors(data), torch.float32) | {"has_next": torch.bool, "trajectory": torch.int64}
    assert {k: v.dtype for k, v in tensors(data).items()} == dtypes
    assert all(v.is_contiguous() and len(v) == len(data) == 11 for v in tensors(data).values())
    digest = hashlib.sha256((tmp_path / "data.hdf5").read_bytes()).hexdigest()
    assert data.facts() == {"id": "data", "source": "file", "sha256": digest, "transitions": 11}
    assert data.act[2, 1] == 1 and data.act.abs().max() <= 1  # clipped to the box


def test_file_without_timeouts_is_cut_at_the_horizon(tmp_path):
    data = recorded([(100, "terminal"), (650, "none")], 4, 2, next_observations=False)
    del data["timeouts"]  # the count begins anew after the terminal: limits in rows 399 and 699, a fragment of 50 rows
    loaded = load(tmp_path, data, MAZE)
    assert torch.bincount(loaded.trajectory).tolist() == [100, 299, 299, 49]
    assert loaded.terminated.nonzero().flatten().tolist() == [99] and no_pair_crosses(loaded)
    data = recorded([(300, "terminal"), (300, "none"), (2, "none")], 4, 2)
    del data["timeouts"]  # a terminal in the last step before the horizon is a terminal
    loaded = load(tmp_path, data, MAZE)
    assert torch.bincount(loaded.trajectory).tolist() == [300, 300, 2]
    assert loaded.terminated.nonzero().flatten().tolist() == [299]
    data = recorded([(200, "none"), (300, "none")], 4, 2)
    del data["timeouts"]  # where there are successors, they alone tell
    assert torch.bincount(load(tmp_path, data, MAZE).trajectory).tolist() == [200, 300]


def test_unmarked_time_limit_starts_a_new_trajectory(tmp_path):
    for last in ("terminal", "none"):
        data = load(tmp_path, recorded([(3, "none"), (4, "none"), (2, last)]))
        assert data.trajectory.tolist() == [0] * 3 + [1] * 4 + [2] * 2
        assert data.has_next.all() and no_pair_crosses(data) and data.terminated.sum() == (last == "terminal")


@pytest.mark.parametrize("next_observations", [True, False])
@pytest.mark.parametrize("flags", [bool, np.uint8, np.int64, np.float32, np.float64])
def test_precision_and_shape_in_the_file_do_not_matter(tmp_path, flags, next_observations):
    data = recorded(ENDS, next_observations=next_observations)
    expected = load(tmp_path, data)
    other = {k: v.astype(flags if v.dtype == bool else np.float64) for k, v in data.items()}
    for k in ("rewards", "terminals"):
        other[k] = other[k][:, None]
    assert_equal(load(tmp_path, other), expected)


def test_antmaze_v0_ends_are_jumps_in_the_plane(tmp_path):
    data = recorded([(60, "timeout")], 29, 8, next_observations=False)
    data["observations"][:, :2] = np.arange(60)[:, None] * 0.1
    data["observations"][20:, 0] += 9  # mean jump about 0.44
    data["observations"][40:, 1] += 9
    data["timeouts"][:] = np.arange(60) % 25 == 24  # the file's own flags are wrong
    v0, v2 = (load(tmp_path, data, parse_task(f"antmaze-large-play-{v}")) for v in ("v0", "v2"))
    assert torch.bincount(v0.trajectory).tolist() == [19, 19, 19]
    assert torch.bincount(v2.trajectory).tolist() == [24, 24, 9]
    assert (v0.next_obs[:, :2] - v0.obs[:, :2]).abs().max() < 0.2
    ours = utils.GENERATED / "antmaze_large_play.hdf5"  # has right flags
    save(ours, data)
    assert_equal(load_dataset(parse_task("antmaze-large-play-v0"), "generated"), v2)


def test_antmaze_terminal_rows_have_a_successor(tmp_path):
    """The ant ran on behind the goal while data was recorded: without that successor no model would see a reward."""
    data = recorded([(20, "timeout")], 29, 8, next_observations=False)
    data["terminals"][[5, 6, 19]] = data["timeouts"][9] = True
    loaded = load(tmp_path, data, parse_task("antmaze-umaze"))
    assert len(loaded) == 18  # a time limit's successor is unknown, and so is whether it was rewarded
    assert loaded.terminated.nonzero().flatten().tolist() == [5, 6]
    assert loaded.has_next.all() and no_pair_crosses(loaded)
    assert loaded.goal().tolist() == [(7 + 8) / 2] * 2  # the middle of where the rewarded steps led


def test_own_antmaze_data_may_end_at_the_goal(tmp_path):
    """Its next row is then a reset, not the successor."""
    loaded = load(
        tmp_path, recorded([(20, "terminal")] * 3, 29, 8, next_observations=False), parse_task("antmaze-umaze")
    )
    assert (~loaded.has_next).nonzero().flatten().tolist() == [19, 39, 59] and no_pair_crosses(loaded)


def test_ant_contact_forces_are_cut_off(tmp_path):
    for next_observations in (True, False):
        narrow, task = recorded(GOOD, 27, 8, next_observations), parse_task("ant-medium")
        wide = {k: np.pad(v, ((0, 0), (0, 84))) if "observations" in k else v for k, v in narrow.items()}
        assert_equal(load(tmp_path, wide, task), load(tmp_path, narrow, task))


# --- bad data ---


def put(key, index, value):
    return lambda d: d[key].__setitem__(index, value)


def only(rows):
    return lambda d: d.update({k: v[rows] for k, v in d.items()})


def no_ends(d):
    d["terminals"][:] = d["timeouts"][:] = False
    d["observations"][:] = np.arange(11)[:, None]  # one motion without a break
    d.pop("next_observations")


# what is done to a good hopper file -> a piece of the message
BAD = {
    "missing observations": (lambda d: d.pop("observations"), "'observations'"),
    "lengths differ": (lambda d: d.update(rewards=d["rewards"][:-1]), "length"),
    "NaN observation": (put("observations", (5, 2), np.nan), "row 5"),
    "NaN in the last successor": (put("next_observations", (10, 0), np.nan), "row 10"),
    "inf reward": (put("rewards", 5, np.inf), "'rewards' holds NaN or inf in row 5"),
    "too large for float32": (lambda d: d.update(rewards=d["rewards"].astype(float) * 1e300), "'rewards' holds NaN"),
    "action out of bounds": (put("actions", (3, 1), -7.5), "7.5"),
    "narrow": (lambda d: d.update({k: d[k][:, :9] for k in ("observations", "next_observations")}), "9 entries"),
    "actions too wide": (lambda d: d.update(actions=np.tile(d["actions"], 2)), "6 entries"),
    "narrow successors": (lambda d: d.update(next_observations=d["next_observations"][:, :9]), "have 9"),
    "one-dimensional actions": (lambda d: d.update(actions=d["actions"][:, 0]), "shape (11,)"),
    "two-dimensional rewards": (lambda d: d.update(rewards=np.tile(d["rewards"][:, None], 3)), "shape (11, 3)"),
    "null rewards": (lambda d: d.update(rewards=h5py.Empty("f4")), "shape None"),
    "empty": (only(slice(0)), "empty"),
    "actions without entries": (lambda d: d.update(actions=d["actions"][:, :0]), "empty"),
    "text": (lambda d: d.update(observations=np.full((11, 11), b"x")), "numbers"),
    "a group in place of an array": (lambda d: d.update({"rewards/x": d.pop("rewards")}), "numbers"),
    "NaN flag": (lambda d: d.update(terminals=np.where(d["terminals"], np.nan, 0)), "0 and 1"),
    "no complete episode": (no_ends, "no complete episode"),
    "a time limit alone": (lambda d: (only(slice(6, 7))(d), d.pop("next_observations")), "no complete transition"),
}


def refused(task, path):
    """The message of the error that `path` causes."""
    with pytest.raises(UserError) as e:
        load_dataset(task, str(path))
    assert e.value.status == 2 and str(path) in str(e.value)
    return str(e.value)


@pytest.mark.parametrize("change, message", BAD.values(), ids=BAD)
def test_bad_arrays_are_refused(tmp_path, change, message):
    data = recorded(GOOD)
    change(data)
    assert message in refused(HOPPER, save(tmp_path / "bad.hdf5", data))


def test_bad_files_are_refused(tmp_path):
    whole = save(tmp_path / "whole.hdf5", recorded(GOOD)).read_bytes()
    cut, page, folder = (tmp_path / f"{n}.hdf5" for n in ("cut", "page", "folder"))
    cut.write_bytes(whole[: len(whole) // 2])
    page.write_bytes(b"<html>403 Forbidden</html>")
    folder.mkdir()
    for path, message in ((cut, "cannot be read"), (page, "cannot be read"), (folder, "is a folder")):
        assert message in refused(HOPPER, path)
    assert "no such file" in refused(HOPPER, tmp_path / "no.hdf5")
    assert "is not a file" in refused(HOPPER, "neither-file-nor-id")
    assert "another task" in refused(parse_task("walker2d-medium"), tmp_path / "whole.hdf5")
    maze = recorded([(5, "timeout")], 4, 2)
    assert len(load(tmp_path, maze, MAZE)) == 5
    maze["observations"][3] = 0  # a defect of old maze2d files
    assert "all-zero" in refused(MAZE, save(tmp_path / "zero.hdf5", maze))


def test_damaged_bytes_never_end_in_a_traceback(tmp_path):
    whole = save(tmp_path / "whole.hdf5", recorded(GOOD)).read_bytes()
    errors, rng = set(), np.random.default_rng(0)
    for start in rng.integers(8, len(whole) - 64, 200):
        (tmp_path / "bad.hdf5").write_bytes(whole[:start] + rng.bytes(64) + whole[start + 64 :])
        try:
            load_dataset(HOPPER, str(tmp_path / "bad.hdf5"))
        except UserError as e:
            errors.add(str(e).split("bad.hdf5: ")[1][:25])
    assert len(errors) > 3  # the file was hit in different places


@pytest.mark.parametrize("how", ["link", "link through a link", "dangling link", "virtual", "external storage"])
def test_data_that_lies_in_other_files_is_refused(tmp_path, how):
    """The sha256 of a file would not see a change of another; and a virtual array of a missing file reads as zeros."""
    data = recorded(GOOD)
    save(tmp_path / "other.hdf5", data)
    obs = data.pop("observations")
    with h5py.File(save(tmp_path / "main.hdf5", data), "r+") as f:
        if how in ("link", "dangling link"):
            f["observations"] = h5py.ExternalLink("other.hdf5" if how == "link" else "none.hdf5", "observations")
        elif how == "link through a link":
            f["other"], f["observations"] = h5py.ExternalLink("other.hdf5", "/"), h5py.SoftLink("/other/observations")
        elif how == "virtual":
            layout = h5py.VirtualLayout(obs.shape, obs.dtype)
            layout[:] = h5py.VirtualSource("none.hdf5", "observations", obs.shape)
            f.create_virtual_dataset("observations", layout)
        else:
            place = [(str(tmp_path / "other.bin"), 0, obs.nbytes)]
            f.create_dataset("observations", data=obs, external=place)
    message = refused(HOPPER, tmp_path / "main.hdf5")
    assert "'observations'" in message and ("in other files" in message or how == "dangling link")


def test_files_that_must_not_be_read_are_not_called_damaged():
    with tempfile.TemporaryDirectory() as folder:
        path = save(Path(folder) / "data.hdf5", recorded(GOOD))
        path.chmod(0)
        Path(folder).chmod(0o711)
        user = os.geteuid()
        try:
            if user == 0:
                os.seteuid(65534)  # whom permissions bind
            with pytest.raises(PermissionError, match=str(path)):  # plumbing.run_script makes one line of it
                load_dataset(HOPPER, str(path))
        finally:
            os.seteuid(user)
    with pytest.raises(OSError, match="too long"):
        load_dataset(HOPPER, "x" * 300)


def test_npz_with_more_arrays_than_d4rls(tmp_path, monkeypatch):
    monkeypatch.setattr(pickle, "loads", None)  # nothing is unpickled
    monkeypatch.setattr(pickle, "load", None)
    data = recorded(GOOD)
    np.savez(tmp_path / "data.npz", **data, name=np.array("hopper"), infos=np.array([{}], object))
    assert_equal(load_dataset(HOPPER, str(tmp_path / "data.npz")), load(tmp_path, data))
    np.savez(tmp_path / "bad.npz", **data | {"rewards": np.array([{}] * 11, object)})
    (tmp_path / "cut.npz").write_bytes((tmp_path / "data.npz").read_bytes()[:-99])
    for name in ("bad", "cut"):
        assert "cannot be read as npz" in refused(HOPPER, tmp_path / f"{name}.npz")


def test_demonstrations_are_the_first_trajectories(tmp_path):
    data, demos = load(tmp_path, recorded(GOOD)), recorded(GOOD)
    del demos["rewards"]
    np.savez(tmp_path / "demos.npz", **demos)
    expert = load_expert(HOPPER, str(tmp_path / "demos.npz"), 2, data)
    assert len(expert) == 7 and not expert.rew.any() and expert.trajectory[-1] == 1
    assert data.facts()["expert"] == expert.facts() | {"trajectories": 2}
    narrow = SimpleNamespace(obs=data.obs[:, :9], act=data.act, path="narrow.hdf5")
    for message, task, source, n, wide in (
        ("--expert-trajectories 4", HOPPER, tmp_path / "demos.npz", 4, data),
        ("--expert-dataset", HOPPER, "none.hdf5", 1, data),
        ("no demonstrations for halfcheetah-jump", parse_task("halfcheetah-jump"), "auto", 1, data),
        ("11 entries, narrow.hdf5 has 9", HOPPER, tmp_path / "demos.npz", 1, narrow),
    ):
        with pytest.raises(UserError, match=message):
            load_expert(task, str(source), n, wide)


@pytest.mark.parametrize("next_observations", [True, False])
def test_loading_holds_no_copy_in_the_precision_of_the_file(tmp_path, next_observations):
    """NumPy's allocations, not ru_maxrss: on Linux a child inherits its parent's peak and would show no growth."""
    n = 300_000
    data = recorded([(1000, "timeout")] * (n // 1000), 17, 6, next_observations)
    path = save(tmp_path / "big.hdf5", {k: v.astype(np.float64) for k, v in data.items()})
    del data
    tracemalloc.start()
    try:
        loaded = load_dataset(parse_task("halfcheetah-medium"), str(path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(loaded) == n - (0 if next_observations else n // 1000)
    assert peak < 2.3 * 4 * n * (17 + 6 + 1 + 17 + 1)


# --- download ---

BODY = bytes(range(256)) * 10_000  # more than one chunk of `download`
SHA256 = hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def server():
    """Address of a local server, and its answers by path."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self):
            path = self.rfile.readline().split()[1].decode()
            while self.rfile.readline().strip():
                pass
            self.wfile.write(answers.get(path, b"HTTP/1.1 404 Not Found\r\n\r\n"))

    half, ok = BODY[: len(BODY) // 2], b"HTTP/1.1 200 OK\r\n"
    chunks = ok + b"Transfer-Encoding: chunked\r\n\r\n" + f"{len(BODY):x}\r\n".encode() + half
    answers = {"/good": answer(BODY), "/cut": answer(half, len(BODY)), "/cut-chunk": chunks, "/garbage": b"SSH\r\n"}
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as tcp:
        threading.Thread(target=tcp.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield f"http://127.0.0.1:{tcp.server_address[1]}", answers
        tcp.shutdown()


def answer(body, size=None):
    return f"HTTP/1.1 200 OK\r\nContent-Length: {size or len(body)}\r\n\r\n".encode() + body


def test_download_arrives_whole_or_not_at_all(tmp_path, server):
    path = tmp_path / "new" / "file.hdf5"
    for known in ("", SHA256[:16]):
        utils.download(f"{server[0]}/good", path, known)
        assert list(path.parent.iterdir()) == [path] and path.read_bytes() == BODY
    path.write_bytes(b"old")
    messages = {"cut": f"got {len(BODY) // 2} of {len(BODY)} bytes", "cut-chunk": "cannot download"}
    messages |= {"garbage": "cannot", "missing": "Not Found", "good": f"sha256 {SHA256[:16]} is not"}
    for page, message in messages.items():
        with pytest.raises(UserError) as e:
            utils.download(f"{server[0]}/{page}", path, "0123456789abcdef")
        assert message in str(e.value) and f"{server[0]}/{page}" in str(e.value)
        assert list(path.parent.iterdir()) == [path] and path.read_bytes() == b"old"


# --- --dataset ---


@pytest.fixture
def bundled(tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "BUNDLED", tmp_path / "bundled")
    return save(tmp_path / "bundled" / "hopper_medium_replay.hdf5", recorded(GOOD))


def test_auto_falls_back_to_bundled_and_says_so(bundled, capsys, tmp_path, monkeypatch):
    data = load_dataset(HOPPER, "auto")
    assert (data.source, data.id, data.path) == ("bundled", "hopper_medium_replay", str(bundled))
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "data: bundled hopper_medium_replay.hdf5" in err and "cannot download" in err
    with pytest.raises(UserError, match=r"hopper_medium_replay-v2\.hdf5"):  # d4rl means d4rl
        load_dataset(HOPPER, "d4rl")
    (tmp_path / "file").touch()
    monkeypatch.setattr(utils, "D4RL", tmp_path / "file" / "d4rl")  # a home that cannot be written
    assert load_dataset(HOPPER, "auto").source == "bundled"


def test_d4rl_file_is_downloaded_once_and_then_preferred(bundled, server, tmp_path, monkeypatch, capsys):
    url, answers = server
    body = save(tmp_path / "official.hdf5", recorded([(5, "terminal")])).read_bytes()
    answers["/gym_mujoco_v2/hopper_medium_replay-v2.hdf5"] = answer(body)
    monkeypatch.setattr(utils, "D4RL_URL", url)
    assert load_dataset(HOPPER, "auto").source == "bundled"  # the known sha256 of the official file does not fit
    assert not list(utils.D4RL.iterdir())
    task = replace(HOPPER, sha256=hashlib.sha256(body).hexdigest()[:16])
    assert load_dataset(task, "auto").source == "d4rl"
    answers.clear()
    capsys.readouterr()
    for source in ("auto", "d4rl"):
        data = load_dataset(task, source)
        assert (data.source, data.id, len(data)) == ("d4rl", "hopper-medium-replay-v2", 5)
        assert ("data: d4rl" in capsys.readouterr().err) == (source == "auto")


def test_generated_comes_last_and_what_is_missing_is_explained(bundled):
    for task in (HOPPER, parse_task("hopper-expert")):
        save(utils.GENERATED / f"hopper_{task.kind.replace('-', '_')}.hdf5", recorded([(6, "terminal")]))
    assert load_dataset(HOPPER, "auto").source == "bundled"
    assert (load_dataset(HOPPER, "generated").source, len(load_dataset(HOPPER, "generated"))) == ("generated", 6)
    assert load_dataset(parse_task("hopper-expert"), "auto").source == "generated"
    for source in ("auto", "generated"):
        with pytest.raises(UserError, match=r"datasets/mujoco\.py --env walker2d --kinds medium-expert"):
            load_dataset(parse_task("walker2d-medium-expert"), source)
    with pytest.raises(UserError, match=r"Ant_maze_u-maze.*_fixed\.hdf5"):
        load_dataset(parse_task("antmaze-umaze"), "auto")
    with pytest.raises(UserError, match="exists as generated data only"):
        load_dataset(parse_task("halfcheetah-jump"), "bundled")


def test_a_signal_ends_the_generator_too(tmp_path):
    """SIGTERM, which no terminal sends to the children. The generator holds standard error as long as it lives."""
    (tmp_path / "datasets").mkdir()
    started = tmp_path / "started"
    (tmp_path / "datasets" / "maze2d.py").write_text(f"import time; open({str(started)!r}, 'w'); time.sleep(60)")
    code = f"import dataclasses, pathlib, plumbing, utils; utils.ROOT = pathlib.Path({str(tmp_path)!r})\n"
    code += "load = lambda args: utils.load_dataset(utils.parse_task('maze2d-umaze'), 'generated')\n"
    code += "plumbing.run_script(load, dataclasses.make_dataclass('Args', []), 'doc')"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not started.exists() and parent.poll() is None:
        time.sleep(0.01)
    parent.send_signal(signal.SIGTERM)
    _, err = parent.communicate(timeout=30)
    assert parent.returncode == 130 and "interrupted" in err


def test_user_without_a_home_and_minari_id_without_a_network():
    """No HOME, no entry in passwd: the defaults are harmless. And an unknown id is refused at once, in one line."""
    code = """import pwd, time; pwd.getpwuid = {}.__getitem__
import utils
hopper, begin = utils.parse_task("hopper-medium"), time.time()
for source in (None, "a/b-v0", "~/x.h5"):
    try: utils.load_dataset(hopper, source) if source else utils.parse_task("a/b-v0")
    except utils.UserError as e: print(e)
print(time.time() - begin)"""
    env = {k: v for k, v in os.environ.items() if k not in ("HOME", "HF_HUB_OFFLINE", "MINARI_DATASETS_PATH")}
    env |= {"HF_ENDPOINT": NOWHERE}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    *lines, seconds = done.stdout.splitlines()
    assert ["a/b-v0 is not available (URLError" in line for line in lines] == [True, True, False]
    assert "no such file" in lines[2] and float(seconds) < 10  # with retries 50 s


# --- Minari ---


def make_minari(dataset_id, env, episodes=GOOD, change=lambda act: act, act_space=None, obs_space=None):
    """Minari dataset of `recorded` episodes with changed actions; spaces are boxes of the environment's widths."""
    made = gymnasium.make(env)
    obs_dim, act_dim = (space.shape[0] if space.shape else 1 for space in (made.observation_space, made.action_space))
    data, buffers = recorded(episodes, obs_dim, act_dim), []
    data["actions"] = change(data["actions"])
    columns = (np.split(v, np.cumsum([length for length, _ in episodes])[:-1]) for v in data.values())
    for i, (obs, act, rew, terminal, timeout, after) in enumerate(zip(*columns, strict=True)):
        obs = np.concatenate([obs, after[-1:]])
        obs = {"observation": obs} if isinstance(obs_space, gymnasium.spaces.Dict) else obs
        flags = {"terminations": terminal, "truncations": timeout}
        buffers.append(EpisodeBuffer(id=i, observations=obs, actions=act, rewards=rew, **flags))
    about = {"observation_space": obs_space or box(np.inf, obs_dim), "action_space": act_space or box(1, act_dim)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # author, e-mail and so on are not given
        minari.create_dataset_from_buffers(dataset_id, buffers, env=env, **about)
    return data


def box(high, width):
    return gymnasium.spaces.Box(-high, high, (width,), np.float32)


def test_minari_round_trip(tmp_path, collector, monkeypatch):
    random = np.random.default_rng(0)
    made = collector.collect("hopper", lambda obs: random.uniform(-1, 1, (len(obs), 3)).astype("f4"), 100, 7, "", 2)
    ends = np.flatnonzero(made["terminals"])
    made["terminals"][ends[1]], made["timeouts"][ends[1]] = False, True  # random hoppers fall; call one a time limit
    meta = {"recipe": "", "margins": "", "seed": 0, "versions": {}}
    collector.write_minari("rewind/hopper/random-v0", made, meta, collector.Args())
    task = parse_task("rewind/hopper/random-v0")
    assert (task.domain, task.kind, task.file, task.slug) == ("hopper", "random-v0", "", "rewind-hopper-random-v0")
    assert normalized_score(task, 3234.3) == 100
    data = load_dataset(task, "auto")
    assert (data.source, data.id, len(data.sha256)) == ("minari", task.id, 64)
    from_file = load(tmp_path, made)
    torch.testing.assert_close(data.act, from_file.act, atol=1e-7, rtol=0)  # rescaled from the box to [-1, 1]
    data.act = from_file.act
    assert_equal(data, from_file)
    assert data.terminated.sum() == len(ends) - 1 and data.trajectory[-1] == len(ends) - 1
    with monkeypatch.context() as m:
        m.setattr(minari.MinariDataset, "iterate_episodes", None)  # the second time all comes from the flat copy
        again = load_dataset(task, "auto")
    again.act = from_file.act
    assert_equal(again, data)
    (copy,) = (utils.GENERATED / "cache").iterdir()
    copy.write_bytes(copy.read_bytes()[:-99])  # a power cut
    assert len(load_dataset(HOPPER, "rewind/hopper/random-v0")) == len(data)
    # Minari stores the id of an environment, not our margins; data and evaluation must not differ in physics
    margins = [make_env(x).unwrapped.model.geom_margin for x in (task, "hopper")]
    assert np.array_equal(*margins)


def test_minari_ends(tmp_path):
    make_minari("test/ends-v0", "Hopper-v5", ENDS)
    data = load_dataset(parse_task("test/ends-v0"), "auto")
    expected = load(tmp_path, recorded(ENDS))  # an episode that ends without a flag is a time limit
    data.act = expected.act
    assert_equal(data, expected)
    make_minari("test/single-v0", "Hopper-v5", [(4, "none")])
    single = load_dataset(parse_task("test/single-v0"), "auto")
    assert len(single) == 4 and not single.terminated.any() and single.has_next.all()
    with pytest.raises(UserError, match="use --dataset auto"):
        load_dataset(parse_task("test/single-v0"), "bundled")


def test_minari_data_that_changes(tmp_path, own_folders, monkeypatch):
    for length in (4, 5):  # under the same id: read anew
        make_minari("test/changes-v0", "Hopper-v5", [(length, "terminal")])
        assert len(load_dataset(parse_task("test/changes-v0"), "auto")) == length
        minari.delete_dataset("test/changes-v0")
    (tmp_path / "file").touch()
    monkeypatch.setattr(utils, "GENERATED", tmp_path / "file" / "datasets")  # no place for the flat copy
    make_minari("test/changes-v0", "Hopper-v5")
    assert len(load_dataset(parse_task("test/changes-v0"), "auto")) == 11
    with h5py.File(own_folders / "minari/test/changes-v0/data/main_data.hdf5", "r+") as f:
        del f["episode_1/rewards"]
    with pytest.raises(UserError, match="test/changes-v0: cannot be read"):
        load_dataset(parse_task("test/changes-v0"), "auto")


def test_minari_actions_are_rescaled_both_ways():
    actions = make_minari("test/pendulum-v0", "Pendulum-v1", change=lambda act: 2 * act, act_space=box(2, 1))["actions"]
    task = parse_task("test/pendulum-v0")
    assert (task.domain, task.reference, task.max_steps) == ("", None, 200) and normalized_score(task, 5.0) is None
    torch.testing.assert_close(load_dataset(task, "auto").act, torch.from_numpy(actions / 2))
    env = make_env(task)
    env.reset(seed=0)
    env.step(np.ones(1, np.float32))
    assert env.unwrapped.last_u == 2  # full torque
    make_minari("test/unbounded-v0", "Pendulum-v1", change=lambda act: 2 * act, act_space=box(np.inf, 1))
    with pytest.raises(UserError, match=r"test/unbounded-v0: actions reach .* outside \[-1, 1\]"):
        load_dataset(parse_task("test/unbounded-v0"), "auto")


class Odd(gymnasium.Env):
    """Never ends, begins with integers, and its actions are bytes."""

    observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gymnasium.spaces.Box(0, 255, (2,), np.uint8)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.taken = []
        return np.zeros(2, np.int64), {}

    def step(self, action):
        self.taken.append(action)
        assert len(self.taken) < 50
        return np.full(2, 0.75), 1.0, False, False, {}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_environment_without_a_time_limit_of_integers(capsys):
    gymnasium.register("Odd-v0", entry_point="test_utils:Odd")
    data = make_minari("test/odd-v0", "Odd-v0", GOOD, lambda act: (127 * act + 128).astype(np.uint8), Odd.action_space)
    task = parse_task("test/odd-v0")
    assert task.max_steps == 4 and "note: Odd-v0 has no time limit" in capsys.readouterr().err
    loaded = load_dataset(task, "auto").act
    torch.testing.assert_close(loaded, torch.from_numpy(data["actions"].astype(np.float32)) / 127.5 - 1)
    env, seen = make_env(task), []

    def act(obs):
        seen.append(obs.clone())
        return torch.tensor([[-1.0, 0.9999]]) if len(seen) == 1 else loaded[:1]

    (obs,), (rewards,) = rollout([env], act, seed=0)
    assert len(rewards) == 4 and obs.tolist() == [[0, 0]] + [[0.75, 0.75]] * 4 and seen[1].tolist() == [[0.75, 0.75]]
    assert env.unwrapped.taken[0].tolist() == [0, 255] and env.unwrapped.taken[0].dtype == np.uint8
    assert env.unwrapped.taken[1].tolist() == data["actions"][0].tolist()


def test_minari_spaces_that_do_not_fit_are_refused():
    zeros, spaces = lambda act: np.zeros(len(act), np.int64), gymnasium.spaces
    make_minari("test/cartpole-v0", "CartPole-v1", GOOD, zeros, spaces.Discrete(2))
    make_minari("test/dict-v0", "Hopper-v5", obs_space=spaces.Dict(observation=box(np.inf, 11)))
    for name, what in (("cartpole", "actions are Discrete"), ("dict", "observations are Dict")):
        with pytest.raises(UserError, match=f"test/{name}-v0: its {what}"):
            load_dataset(parse_task(f"test/{name}-v0"), "auto")
    with pytest.raises(UserError, match="need continuous actions"):
        make_env(parse_task("test/cartpole-v0"))
    with pytest.raises(UserError, match=r"no evaluation environment.*--eval-episodes 0"):
        make_env(utils.Task("test/without-v0", "", "without-v0", None))

    make_minari("test/ant-v0", "Ant-v5")  # wider than D4RL's ant
    task = parse_task("test/ant-v0")
    assert task.domain == "ant" and load_dataset(task, "auto").obs.shape[1] == 105
    assert make_env(task).observation_space.shape == (105,)
    with pytest.raises(UserError, match="105 entries"):
        load_dataset(parse_task("ant-medium"), "test/ant-v0")
    make_minari("test/ant-expert-v0", "Ant-v5")
    assert load_dataset(task, "test/ant-expert-v0").obs.shape[1] == 105
    make_minari("test/narrow-v0", "Hopper-v5")
    with pytest.raises(UserError, match=r"11 entries, test/ant-v0 has 105"):
        load_dataset(task, "test/narrow-v0")


# --- environments ---


def replay_errors(env, robot):
    """Error of one control step against MuJoCo 2.2.0: absolute, and in standard deviations of the state change."""
    with np.load(REFERENCE_STEPS) as f:
        states, actions, targets = (f[f"{robot}_{k}"] for k in ("states", "actions", "next_states"))
    env.reset(seed=0)
    error, env = np.empty_like(states), env.unwrapped
    for i, (state, action) in enumerate(zip(states, actions, strict=True)):
        env.set_state(state[: env.model.nq], state[env.model.nq :])
        env.data.qacc_warmstart[:] = 0
        env.step(action)
        error[i] = np.abs(np.r_[env.data.qpos, env.data.qvel] - targets[i])
    return error.max(1), (error / (targets - states).std(0)).max(1)


@pytest.mark.parametrize("robot, tolerance", {"halfcheetah": 1e-5, "walker2d": 1e-5, "hopper": 1e-6, "ant": 1}.items())
def test_one_step_equals_mujoco_2(robot, tolerance, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo logs a deprecation into the working directory
    absolute, relative = replay_errors(make_env(robot), robot)
    assert absolute.max() < tolerance and relative.max() < 0.1
    assert np.median(relative) < 1e-3 and np.quantile(relative, 0.99) < 1e-2
    adds_margins = tuple(int(n) for n in mujoco.__version__.split(".")[:2]) >= (3, 5)
    if robot in ("hopper", "ant") and adds_margins:  # without the correction it is wrong
        absolute, relative = replay_errors(gymnasium.make(utils.ROBOTS[robot]), robot)
        assert absolute.max() > 1e-2 and np.median(relative) > 1e-2


@pytest.mark.parametrize("version", ["3.4.1", "3.5.0", "3.17.0", "4.0.0"])
@pytest.mark.parametrize("domain, name", utils.ROBOTS.items())
def test_environment_fits_the_data_and_margins_are_halved(domain, name, version, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mujoco, "__version__", version)
    env, shipped = make_env(domain), gymnasium.make(name).unwrapped.model.geom_margin
    halved = domain in ("hopper", "ant") and version != "3.4.1"
    assert np.array_equal(env.unwrapped.model.geom_margin, shipped * (0.5 if halved else 1))
    assert (env.spec.id, env.spec.max_episode_steps) == (name, 1000) and ((shipped > 0).any() or not halved)
    assert (*env.observation_space.shape, *env.action_space.shape) == utils.WIDTHS[domain]
    assert (env.action_space.low == -1).all() and (env.action_space.high == 1).all()


# --- evaluation ---


class Countdown(gymnasium.Env):
    """Ends after seed modulo 97 steps, by terminal if even, else by time limit; pays the action; must not go on."""

    def reset(self, seed=None, options=None):
        self.left = seed % 97
        self.even = self.left % 2 == 0
        return np.full(2, self.left), {}

    def step(self, action):
        assert self.left > 0, "stepped after its end"
        self.left -= 1
        over = self.left == 0
        return np.full(2, self.left, np.float64), float(action[0]), over and self.even, over and not self.even, {}


def test_rollout_by_hand():
    seen = []

    def act(obs):
        seen.append(obs.clone())
        return obs[:, :1]  # pays what is left: an episode of length n returns n (n + 1) / 2

    obs, rewards = rollout([Countdown() for _ in range(4)], act, seed=2)
    assert [r.tolist() for r in rewards] == [[2, 1], [3, 2, 1], [4, 3, 2, 1], [5, 4, 3, 2, 1]]
    assert [o[:, 0].tolist() for o in obs] == [[2, 1, 0], [3, 2, 1, 0], [4, 3, 2, 1, 0], [5, 4, 3, 2, 1, 0]]
    assert [len(x) for x in seen] == [4, 4, 3, 2, 1] and seen[2].tolist() == [[1, 1], [2, 2], [3, 3]]
    assert all(x.dtype == torch.float32 for x in seen) and all(o.dtype == np.float32 for o in obs)


def test_metrics_of_an_evaluation_by_hand():
    metrics = {"eval/return": 8, "eval/return_std": 2, "eval/length": 3.5}  # of episodes of 3 and 4 steps
    metrics |= {"eval/discounted_return": ((3 + 1 + 0.25) + (4 + 1.5 + 0.5 + 0.125)) / 2}
    metrics |= {"eval/normalized_score": normalized_score(HOPPER, 8)}
    envs, episodes = [Countdown(), Countdown()], []
    assert evaluate(HOPPER, envs, lambda obs: obs[:, :1], 0, 0.5, episodes=episodes) == metrics
    assert [len(o) for o in episodes] == [4, 5]


def test_batched_episodes_equal_single_ones():
    def act(obs):
        assert not torch.is_grad_enabled()
        return obs[:, -3:].clamp(-1, 1)  # entry by entry, so that rounding does not depend on the batch

    envs = [make_env("hopper") for _ in range(4)]
    _, rewards = rollout(envs, act, seed=10)
    single = [rollout(envs[:1], act, seed=10 + i)[1][0] for i in range(4)]
    assert all(np.array_equal(a, b) for a, b in zip(rewards, single, strict=True))
    assert len({r.sum() for r in rewards}) == 4  # each has its own seed


def test_evaluation_leaves_the_random_numbers_alone():
    torch.manual_seed(3)
    expected = torch.rand(5)
    torch.manual_seed(3)
    rollout([Countdown()], lambda obs: torch.randn(len(obs), 1), seed=4)
    with pytest.raises(UserError, match="diverged") as e:
        rollout([Countdown()], lambda obs: obs[:, :1] * np.nan, seed=4)
    assert torch.equal(torch.rand(5), expected) and e.value.status == 3


def test_imagined_states_that_explode_are_logged():
    obs, act, rew = torch.zeros(3, 11), torch.zeros(3, 3), torch.zeros(3)
    next_obs = obs.clone()
    next_obs[1, 2] = -500
    for pair in ((obs, next_obs), (next_obs, obs)):
        stats = utils.describe_imagination(parse_task("hopper-medium"), pair[0], act, rew, pair[1], rew, [], None)
        assert stats["model/imagined_state_max"] == 500
