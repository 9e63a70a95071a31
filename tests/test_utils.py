"""utils.py: task names, what the loader makes of files, downloads, Minari, environments, evaluation."""

import hashlib
import http.server
import threading
import time
import tracemalloc
import warnings
from pathlib import Path

import gymnasium
import h5py
import minari
import mujoco
import numpy as np
import pytest
import torch
from minari.data_collector import EpisodeBuffer

import utils
from utils import TASKS, UserError, evaluate, load_dataset, make_env, normalized_score, parse_task

REFERENCE_STEPS = Path(__file__).resolve().parents[2] / "shared" / "data" / "mujoco_reference.npz"
if not REFERENCE_STEPS.exists():
    REFERENCE_STEPS = Path(__file__).with_name("mujoco_2_steps.npz")  # 80 of its 500 rows a robot
HOPPER, MAZE = parse_task("hopper-medium-replay"), parse_task("maze2d-umaze")
GOOD = [(4, "terminal"), (3, "timeout"), (4, "terminal")]


def recorded(episodes, obs_dim=11, act_dim=3, next_observations=True):
    """Arrays of a D4RL file. Episode e visits the states 100 e + 1, 100 e + 2, ..., each repeated obs_dim times; rewards count rows."""
    states = [100 * e + 1 + np.arange(length + 1) for e, (length, _) in enumerate(episodes)]
    last = np.cumsum([length for length, _ in episodes]) - 1
    n = last[-1] + 1
    flags = {k: np.isin(np.arange(n), last[[end in (k, "both") for _, end in episodes]]) for k in ("terminal", "timeout")}
    data = {
        "observations": np.tile(np.concatenate([s[:-1] for s in states])[:, None], obs_dim).astype(np.float32),
        "actions": np.random.default_rng(0).uniform(-1, 1, (n, act_dim)).astype(np.float32),
        "rewards": np.arange(1, n + 1, dtype=np.float32),
        "terminals": flags["terminal"],
        "timeouts": flags["timeout"],
    }
    if next_observations:
        data["next_observations"] = np.tile(np.concatenate([s[1:] for s in states])[:, None], obs_dim).astype(np.float32)
    return data


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

GYM = {"halfcheetah": (-280.178953, 12135.0), "hopper": (-20.272305, 3234.3), "walker2d": (1.629008, 4592.3), "ant": (-325.6, 3879.7)}
MAZES = {
    "umaze": (23.85, 161.86, 300),
    "medium": (13.13, 277.39, 600),
    "large": (6.7, 273.99, 800),
    "umaze-dense": (68.537689, 193.66285642381482, 300),
    "medium-dense": (44.264742, 297.4552547777125, 600),
    "large-dense": (30.569041, 303.4857382709002, 800),
}
ANTMAZES = {
    "umaze": ("u-maze_noisy_multistart_False_multigoal_False", 700),
    "umaze-diverse": ("u-maze_noisy_multistart_True_multigoal_True", 700),
    "medium-play": ("big-maze_noisy_multistart_True_multigoal_False", 1000),
    "medium-diverse": ("big-maze_noisy_multistart_True_multigoal_True", 1000),
    "large-play": ("hardest-maze_noisy_multistart_True_multigoal_False", 1000),
    "large-diverse": ("hardest-maze_noisy_multistart_True_multigoal_True", 1000),
}


def expected_tasks():
    """(names that mean it, id, official file, reference scores, horizon) of every D4RL task: tasks.md, 1.1 to 1.4."""
    for robot, reference in GYM.items():
        for kind in ("random", "medium", "medium-replay", "medium-expert", "expert"):
            name, file = f"{robot}-{kind}", f"gym_mujoco_v2/{robot}_{kind.replace('-', '_')}-v2.hdf5"
            yield (name, f"{name}-v2"), f"{name}-v2", file, reference, 1000
    for kind, (low, high, steps) in MAZES.items():
        file = f"maze2d/maze2d-{kind}-v1.hdf5" if "dense" in kind else f"maze2d/maze2d-{kind}-sparse-v1.hdf5"
        yield (f"maze2d-{kind}", f"maze2d-{kind}-v1"), f"maze2d-{kind}-v1", file, (low, high), steps
    for kind, (stem, steps) in ANTMAZES.items():
        name = f"antmaze-{kind}"
        yield (f"{name}-v0",), f"{name}-v0", f"ant_maze_new/Ant_maze_{stem}_sparse.hdf5", (0, 1), steps
        yield (name, f"{name}-v2"), f"{name}-v2", f"ant_maze_v2/Ant_maze_{stem}_sparse_fixed.hdf5", (0, 1), steps


@pytest.mark.parametrize("names, task_id, file, reference, max_steps", list(expected_tasks()))
def test_d4rl_names(names, task_id, file, reference, max_steps):
    for name in names:
        task = parse_task(name)
        assert (task.id, task.file, task.reference, task.max_steps) == (task_id, file, reference, max_steps)
        assert f"{task.domain}-{task.kind}" == task_id[:-3] and task.slug == task_id
    assert normalized_score(task, reference[0]) == 0 and normalized_score(task, reference[1]) == 100


def test_there_are_no_other_tasks_and_every_checksum_belongs_to_one():
    ours = {"halfcheetah-jump-v1", "ant-angle-v1"}
    assert set(TASKS) == {task_id for _, task_id, *_ in expected_tasks()} | ours and len(TASKS) == 20 + 6 + 12 + 2
    assert set(utils.CHECKSUMS) <= {Path(t.file).stem for t in TASKS.values()} and len(utils.CHECKSUMS) == 20 + 5
    assert utils.CHECKSUMS["hopper_medium_replay-v2"] == (75854457, "e121c5f7c9857a30")


@pytest.mark.parametrize(
    "name, hint",
    [
        ("hoper-medium-replay", "hopper-medium-replay"),
        ("hopper-medium-v0", "hopper-medium"),
        ("maze2d-umase", "maze2d-umaze"),
        ("antmaze-large", "antmaze-large-play"),
        ("CartPole-v1", "is an environment"),
        ("Hopper-v4", "is an environment"),
        ("Rewind/Maze2d-umaze-v1", "is an environment, not a data set; did you mean maze2d-umaze"),
        ("zzz", "D4RL names such as"),
        ("", "D4RL names such as"),
    ],
)
def test_unknown_task_is_refused_with_a_hint(name, hint):
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
    data = load(tmp_path, recorded(GOOD))
    assert {k: v.dtype for k, v in tensors(data).items()} == dict.fromkeys(tensors(data), torch.float32) | {
        "has_next": torch.bool,
        "trajectory": torch.int64,
    }
    assert all(v.is_contiguous() and len(v) == len(data) == 11 for v in tensors(data).values())
    digest = hashlib.sha256((tmp_path / "data.hdf5").read_bytes()).hexdigest()
    assert data.facts() == {"id": "data", "source": "file", "sha256": digest, "transitions": 11}


def test_rows_are_those_of_d4rl_qlearning_dataset(tmp_path):
    rng, n = np.random.default_rng(1), 500
    data = recorded([(n, "none")], next_observations=False)
    kind = rng.choice(3, n - 1, p=[0.8, 0.1, 0.1])  # D4RL always loses the last row, we keep it if terminal: leave it unmarked
    data["terminals"][:-1], data["timeouts"][:-1] = kind == 1, kind == 2
    rows = [i for i in range(n - 1) if not data["timeouts"][i]]
    loaded = load(tmp_path, data)
    assert loaded.rew.tolist() == data["rewards"][rows].tolist()
    assert loaded.terminated.bool().tolist() == data["terminals"][rows].tolist()
    successors = torch.from_numpy(data["observations"][[i + 1 for i in rows]])
    assert torch.equal(loaded.next_obs[loaded.has_next], successors[loaded.has_next])
    assert torch.equal(loaded.has_next, loaded.terminated == 0)


def test_file_without_timeouts_is_cut_at_the_horizon(tmp_path):
    data = recorded([(100, "terminal"), (650, "none")], 4, 2, next_observations=False)
    del data["timeouts"]  # the count begins anew after the terminal: limits in rows 399 and 699, a fragment of 50 rows
    loaded = load(tmp_path, data, MAZE)
    assert torch.bincount(loaded.trajectory).tolist() == [100, 299, 299, 49]
    assert loaded.terminated.nonzero().flatten().tolist() == [99] and no_pair_crosses(loaded)


def test_terminal_in_the_last_step_before_the_horizon_is_a_terminal(tmp_path):
    data = recorded([(300, "terminal"), (300, "none"), (2, "none")], 4, 2)
    del data["timeouts"]
    loaded = load(tmp_path, data, MAZE)
    assert torch.bincount(loaded.trajectory).tolist() == [300, 300, 2]
    assert loaded.terminated.nonzero().flatten().tolist() == [299]


@pytest.mark.parametrize("last", ["terminal", "none"])
def test_unmarked_time_limit_starts_a_new_trajectory(tmp_path, last):
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


def test_actions_are_clipped_to_the_box(tmp_path):
    data = recorded(GOOD)
    data["actions"][2, 1] = 1.00005  # rounding of somebody's rescaling, not an error
    loaded = load(tmp_path, data)
    assert loaded.act[2, 1] == 1 and loaded.act.abs().max() <= 1


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


@pytest.mark.parametrize("next_observations", [True, False])
def test_ant_contact_forces_are_cut_off(tmp_path, next_observations):
    narrow = recorded(GOOD, 27, 8, next_observations)
    wide = {k: np.pad(v, ((0, 0), (0, 84))) if "observations" in k else v for k, v in narrow.items()}
    task = parse_task("ant-medium")
    assert_equal(load(tmp_path, wide, task), load(tmp_path, narrow, task))
    assert load(tmp_path, wide, task).obs.shape[1] == 27


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
    "missing terminals": (lambda d: d.pop("terminals"), "'terminals'"),
    "lengths differ": (lambda d: d.update(rewards=d["rewards"][:-1]), "length"),
    "flags too short": (lambda d: d.update(timeouts=d["timeouts"][:-1]), "length"),
    "NaN observation": (put("observations", (5, 2), np.nan), "row 5"),
    "NaN in the last successor": (put("next_observations", (10, 0), np.nan), "row 10"),
    "inf reward": (put("rewards", 5, np.inf), "'rewards' holds NaN or inf in row 5"),
    "inf action": (put("actions", (5, 0), -np.inf), "'actions' holds NaN or inf"),
    "too large for float32": (lambda d: d.update(rewards=d["rewards"].astype(float) * 1e300), "'rewards' holds NaN or inf"),
    "action out of bounds": (put("actions", (3, 1), -7.5), "7.5"),
    "observations too narrow": (lambda d: d.update({k: d[k][:, :9] for k in ("observations", "next_observations")}), "9 entries"),
    "actions too wide": (lambda d: d.update(actions=np.tile(d["actions"], 2)), "6 entries"),
    "successors of another width": (lambda d: d.update(next_observations=d["next_observations"][:, :9]), "next_observations have 9"),
    "one-dimensional actions": (lambda d: d.update(actions=d["actions"][:, 0]), "shape (11,)"),
    "two-dimensional rewards": (lambda d: d.update(rewards=np.tile(d["rewards"][:, None], 3)), "shape (11, 3)"),
    "scalar rewards": (lambda d: d.update(rewards=np.float32(1)), "shape ()"),
    "null rewards": (lambda d: d.update(rewards=h5py.Empty("f4")), "shape None"),
    "empty": (only(slice(0)), "empty"),
    "actions without entries": (lambda d: d.update(actions=d["actions"][:, :0]), "empty"),
    "text": (lambda d: d.update(observations=np.full((11, 11), b"x")), "numbers"),
    "complex numbers": (lambda d: d.update(rewards=d["rewards"] * 1j), "numbers"),
    "a group in place of an array": (lambda d: d.update({"rewards/x": d.pop("rewards")}), "numbers"),
    "NaN flag": (lambda d: d.update(terminals=np.where(d["terminals"], np.nan, 0)), "0 and 1"),
    "no complete episode": (no_ends, "no complete episode"),
    "a single row": (lambda d: (no_ends(d), only(slice(1))(d)), "no complete"),
    "a time limit with unknown successor": (lambda d: (only(slice(6, 7))(d), d.pop("next_observations")), "no complete transition"),
}


def refused(task, path, capsys):
    """The message of the error that `path` causes; it names the file and is one line on standard error."""
    with pytest.raises(UserError) as e:
        load_dataset(task, str(path))
    capsys.readouterr()
    assert e.value.report() == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and str(path) in err
    return err


@pytest.mark.parametrize("change, message", BAD.values(), ids=BAD)
def test_bad_arrays_are_refused(tmp_path, capsys, change, message):
    data = recorded(GOOD)
    change(data)
    assert message in refused(HOPPER, save(tmp_path / "bad.hdf5", data), capsys)


def test_bad_files_are_refused(tmp_path, capsys):
    whole = save(tmp_path / "whole.hdf5", recorded(GOOD)).read_bytes()
    cut, page, folder = (tmp_path / f"{n}.hdf5" for n in ("cut", "page", "folder"))
    cut.write_bytes(whole[: len(whole) // 2])
    page.write_bytes(b"<html>403 Forbidden</html>")
    folder.mkdir()
    for path, message in ((cut, "cannot be read"), (page, "cannot be read"), (folder, "folder"), (tmp_path / "no.hdf5", "no such file")):
        assert message in refused(HOPPER, path, capsys)
    refused(HOPPER, "neither-file-nor-id", capsys)
    assert "another task" in refused(parse_task("walker2d-medium"), tmp_path / "whole.hdf5", capsys)


def test_damaged_bytes_never_end_in_a_traceback(tmp_path):
    whole = save(tmp_path / "whole.hdf5", recorded(GOOD)).read_bytes()
    errors, rng = set(), np.random.default_rng(0)
    for start in rng.integers(8, len(whole) - 64, 300):
        (tmp_path / "bad.hdf5").write_bytes(whole[:start] + rng.bytes(64) + whole[start + 64 :])
        try:
            load_dataset(HOPPER, str(tmp_path / "bad.hdf5"))
        except UserError as e:
            errors.add(str(e).split("bad.hdf5: ")[1][:25])
    assert len(errors) > 3  # the file was hit in different places


def test_zero_observations_of_old_maze2d_files_are_refused(tmp_path, capsys):
    data = recorded([(5, "timeout")], 4, 2)
    data["observations"][3] = 0
    assert "all-zero" in refused(MAZE, save(tmp_path / "zero.hdf5", data), capsys)
    assert len(load(tmp_path, recorded([(5, "timeout")], 4, 2), MAZE)) == 5


@pytest.mark.parametrize("next_observations", [True, False])
def test_loading_holds_no_copy_in_the_precision_of_the_file(tmp_path, next_observations):
    """NumPy's allocations, not ru_maxrss: on Linux a child inherits its parent's peak and would show no growth at all."""
    n = 300_000
    data = {k: v.astype(np.float64) for k, v in recorded([(1000, "timeout")] * (n // 1000), 17, 6, next_observations).items()}
    path = save(tmp_path / "big.hdf5", data)
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


@pytest.fixture
def server():
    """Address of a local server; files[path] is a body or a way to misbehave."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = files.get(self.path)
            if body is None:
                return self.send_error(404)
            if body == "garbage":
                return self.wfile.write(b"SSH-2.0-OpenSSH\r\n\r\n")
            self.send_response(200)
            if body == "cut":
                self.send_header("Content-Length", str(len(BODY)))
                self.end_headers()
                self.wfile.write(BODY[: len(BODY) // 2])
            elif body == "cut chunk":
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                self.wfile.write(b"%x\r\n" % len(BODY) + BODY[: len(BODY) // 2])
            else:
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    files = {"/good": BODY, "/cut": "cut", "/cut-chunk": "cut chunk", "/garbage": "garbage"}
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}", files
        httpd.shutdown()


def test_complete_download_arrives_under_its_name(tmp_path, server):
    for known in ((), (len(BODY), hashlib.sha256(BODY).hexdigest()[:16])):
        utils.download(f"{server[0]}/good", tmp_path / "new" / "file.hdf5", *known)
        assert [p.name for p in (tmp_path / "new").iterdir()] == ["file.hdf5"]
        assert (tmp_path / "new" / "file.hdf5").read_bytes() == BODY


@pytest.mark.parametrize(
    "page, known, message",
    [
        ("cut", (), f"got {len(BODY) // 2} of {len(BODY)} bytes"),
        ("cut-chunk", (), "cannot download"),
        ("garbage", (), "cannot download"),
        ("missing", (), "Not Found"),
        ("good", (len(BODY) + 1,), f"got {len(BODY)} of {len(BODY) + 1} bytes"),
        ("good", (len(BODY), "0123456789abcdef"), "sha256"),
    ],
)
def test_broken_download_leaves_nothing(tmp_path, server, page, known, message):
    with pytest.raises(UserError) as e:
        utils.download(f"{server[0]}/{page}", tmp_path / "file.hdf5", *known)
    assert message in str(e.value) and f"{server[0]}/{page}" in str(e.value)
    assert list(tmp_path.iterdir()) == []


def test_broken_download_leaves_an_older_file_alone(tmp_path, server):
    (tmp_path / "file.hdf5").write_bytes(b"old")
    with pytest.raises(UserError):
        utils.download(f"{server[0]}/cut", tmp_path / "file.hdf5")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]


def test_folder_that_cannot_be_made(tmp_path, server):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot download"):
        utils.download(f"{server[0]}/good", tmp_path / "file" / "below" / "x.hdf5")


# --- --dataset ---


@pytest.fixture
def bundled(tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "BUNDLED", tmp_path / "bundled")
    return save(tmp_path / "bundled" / "hopper_medium_replay.hdf5", recorded(GOOD))


def test_auto_falls_back_to_bundled_and_says_so(bundled, capsys):
    data = load_dataset(HOPPER, "auto")
    assert (data.source, data.id, data.path) == ("bundled", "hopper_medium_replay", str(bundled))
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "data: bundled hopper_medium_replay.hdf5" in err and "cannot download" in err
    with pytest.raises(UserError, match=r"hopper_medium_replay-v2\.hdf5"):  # d4rl means d4rl
        load_dataset(HOPPER, "d4rl")


def test_auto_survives_a_home_that_cannot_be_written(bundled, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(utils, "D4RL", tmp_path / "file" / "d4rl")
    assert load_dataset(HOPPER, "auto").source == "bundled"


@pytest.mark.parametrize("source", ["auto", "d4rl"])
def test_local_d4rl_file_is_preferred(bundled, capsys, source):
    save(utils.D4RL / "hopper_medium_replay-v2.hdf5", recorded([(5, "terminal")]))
    data = load_dataset(HOPPER, source)
    assert (data.source, data.id, len(data)) == ("d4rl", "hopper-medium-replay-v2", 5)
    assert ("data: d4rl" in capsys.readouterr().err) == (source == "auto")


def test_d4rl_file_is_downloaded_once_and_kept(bundled, server, tmp_path, monkeypatch, capfd):
    url, files = server
    body = save(tmp_path / "official.hdf5", recorded([(5, "terminal")])).read_bytes()
    files["/gym_mujoco_v2/hopper_medium_replay-v2.hdf5"] = body
    monkeypatch.setattr(utils, "D4RL_URL", url)
    assert load_dataset(HOPPER, "auto").source == "bundled"  # the known size and sha256 of the official file do not fit
    assert not list(utils.D4RL.iterdir())
    monkeypatch.setitem(utils.CHECKSUMS, "hopper_medium_replay-v2", (len(body), hashlib.sha256(body).hexdigest()[:16]))
    assert load_dataset(HOPPER, "auto").source == "d4rl"
    files.clear()
    assert load_dataset(HOPPER, "auto").source == "d4rl"


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


# --- Minari ---


def make_minari(dataset_id, env, episodes=GOOD, low=-1, high=1, scale=1, action_space=None, observation_space=None, **kwargs):
    """Minari data set of `recorded` episodes, actions times `scale`; spaces are boxes of the environment's widths by default."""
    make = gymnasium.make(env)
    obs_dim, act_dim = (space.shape[0] if space.shape else 1 for space in (make.observation_space, make.action_space))
    data, begin, buffers = recorded(episodes, obs_dim, act_dim), 0, []
    for i, (length, end) in enumerate(episodes):
        rows = slice(begin, begin + length)
        obs = np.concatenate([data["observations"][rows], data["next_observations"][rows][-1:]])
        act = data["actions"][rows] * scale
        if action_space is not None:
            act = np.zeros(length, np.int64)
        last = np.arange(length) == length - 1
        flags = (last & (end in ("terminal", "both")), last & (end in ("timeout", "both")))
        obs = {"observation": obs} if isinstance(observation_space, gymnasium.spaces.Dict) else obs
        names = ("id", "observations", "actions", "rewards", "terminations", "truncations")
        buffers.append(EpisodeBuffer(**dict(zip(names, (i, obs, act, data["rewards"][rows], *flags), strict=True))))
        begin += length
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # author, e-mail and so on are not given
        minari.create_dataset_from_buffers(
            dataset_id,
            buffers,
            env=env,
            observation_space=observation_space or gymnasium.spaces.Box(-np.inf, np.inf, (obs_dim,), np.float32),
            action_space=action_space or gymnasium.spaces.Box(low, high, (act_dim,), np.float32),
            **kwargs,
        )
    return data


def test_minari_round_trip(tmp_path, collector, monkeypatch):
    random = np.random.default_rng(0)
    made = collector.collect("hopper", lambda obs: random.uniform(-1, 1, (len(obs), 3)).astype("f4"), 100, 7, "test", num_envs=2)
    ends = np.flatnonzero(made["terminals"])
    made["terminals"][ends[1]], made["timeouts"][ends[1]] = False, True  # random hoppers fall; call one fall a time limit
    meta = {"recipe": "", "margins": "", "seed": 0, "versions": {}}
    collector.write_minari("rewind/hopper/random-v0", made, meta, collector.Args())

    task = parse_task("rewind/hopper/random-v0")
    assert (task.domain, task.kind, task.file, task.slug) == ("hopper", "random-v0", "", "rewind-hopper-random-v0")
    assert normalized_score(task, GYM["hopper"][1]) == 100
    data = load_dataset(task, "auto")
    assert (data.source, data.id, len(data.sha256)) == ("minari", task.id, 64)
    from_file = load(tmp_path, made)
    torch.testing.assert_close(data.act, from_file.act, atol=1e-7, rtol=0)  # rescaled from the box to [-1, 1]
    data.act = from_file.act
    assert_equal(data, from_file)
    assert data.terminated.sum() == len(ends) - 1 and data.trajectory[-1] == len(ends) - 1
    assert torch.equal(data.next_obs[:-1][data.trajectory.diff() == 0], data.obs[1:][data.trajectory.diff() == 0])

    monkeypatch.setattr(minari.MinariDataset, "iterate_episodes", None)  # the second time all comes from the flat copy
    again = load_dataset(task, "auto")
    again.act = from_file.act
    assert_equal(again, data)
    assert load_dataset(HOPPER, "rewind/hopper/random-v0").source == "minari"
    # Minari stores the id of an environment, not our margins; data and evaluation must not differ in physics
    assert np.array_equal(make_env(task).unwrapped.model.geom_margin, make_env("hopper").unwrapped.model.geom_margin)


def test_minari_ends(tmp_path):
    make_minari("test/ends-v0", "Hopper-v5", ENDS)
    data = load_dataset(parse_task("test/ends-v0"), "auto")
    expected = load(tmp_path, recorded(ENDS))  # an episode that ends without a flag is a time limit
    data.act = expected.act
    assert_equal(data, expected)
    make_minari("test/single-v0", "Hopper-v5", [(4, "none")])
    single = load_dataset(parse_task("test/single-v0"), "auto")
    assert len(single) == 4 and not single.terminated.any() and single.has_next.all()


def test_minari_data_changed_under_the_same_id_is_read_anew():
    for lengths in ([(4, "terminal")], [(5, "terminal")]):
        make_minari("test/changes-v0", "Hopper-v5", lengths)
        assert len(load_dataset(parse_task("test/changes-v0"), "auto")) == lengths[0][0]
        minari.delete_dataset("test/changes-v0")


def test_minari_without_a_place_for_the_flat_copy(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(utils, "GENERATED", tmp_path / "file" / "datasets")
    make_minari("test/hopper-v0", "Hopper-v5")
    assert len(load_dataset(parse_task("test/hopper-v0"), "auto")) == 11


def test_missing_minari_id_is_refused_without_retries():
    begin = time.monotonic()
    for call in (lambda: parse_task("mujoco/hopper/none-v0"), lambda: load_dataset(HOPPER, "mujoco/hopper/none-v0")):
        with pytest.raises(UserError, match=r"mujoco/hopper/none-v0 cannot be had \((?!FileNotFound)"):  # it did ask the remote
            call()
    assert time.monotonic() - begin < 10  # one round of retries takes 23 s
    make_minari("test/hopper-v0", "Hopper-v5")
    with pytest.raises(UserError, match="use --dataset auto"):
        load_dataset(parse_task("test/hopper-v0"), "bundled")


def test_minari_actions_are_rescaled_both_ways():
    recorded_actions = make_minari("test/pendulum-v0", "Pendulum-v1", low=-2, high=2, scale=2)["actions"]
    task = parse_task("test/pendulum-v0")
    assert task.domain == "" and task.reference is None and normalized_score(task, 5.0) is None
    torch.testing.assert_close(load_dataset(task, "auto").act, torch.from_numpy(recorded_actions))
    env = make_env(task)
    env.reset(seed=0)
    env.step(np.ones(1, np.float32))
    assert env.unwrapped.last_u == 2  # full torque


def test_minari_actions_outside_an_unbounded_box_are_refused():
    make_minari("test/unbounded-v0", "Pendulum-v1", low=-np.inf, high=np.inf, scale=2)
    with pytest.raises(UserError, match=r"test/unbounded-v0: actions reach .* outside \[-1, 1\]"):
        load_dataset(parse_task("test/unbounded-v0"), "auto")


def test_minari_ant_v5_is_wider_than_d4rl_ant():
    make_minari("test/ant-v0", "Ant-v5")
    task = parse_task("test/ant-v0")
    assert task.domain == "ant" and load_dataset(task, "auto").obs.shape[1] == 105 == make_env(task).observation_space.shape[0]
    with pytest.raises(UserError, match="105 entries"):
        load_dataset(parse_task("ant-medium"), "test/ant-v0")


def test_minari_spaces_that_do_not_fit_are_refused():
    make_minari("test/cartpole-v0", "CartPole-v1", action_space=gymnasium.spaces.Discrete(2))
    inner = gymnasium.spaces.Box(-np.inf, np.inf, (11,), np.float32)
    make_minari("test/dict-v0", "Hopper-v5", observation_space=gymnasium.spaces.Dict(observation=inner))
    for name, what in (("cartpole", "actions are Discrete"), ("dict", "observations are Dict")):
        with pytest.raises(UserError, match=f"test/{name}-v0: its {what}"):
            load_dataset(parse_task(f"test/{name}-v0"), "auto")
    with pytest.raises(UserError, match="need continuous actions"):
        make_env(parse_task("test/cartpole-v0"))


# --- environments ---


def replay_errors(env, robot):
    """Error of one control step against MuJoCo 2.2.0: absolute, and relative to the standard deviation of the state change."""
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


@pytest.mark.parametrize("robot, tolerance", [("halfcheetah", 1e-5), ("walker2d", 1e-5), ("hopper", 1e-6)])
def test_one_step_equals_mujoco_2(robot, tolerance, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo logs a deprecation into the working directory
    assert replay_errors(make_env(robot), robot)[0].max() < tolerance


def test_one_step_of_ant_is_close_to_mujoco_2():
    relative = replay_errors(make_env("ant"), "ant")[1]
    assert np.median(relative) < 1e-3 and np.quantile(relative, 0.99) < 1e-2 and relative.max() < 0.1


def mujoco_version():
    return tuple(int(n) for n in mujoco.__version__.split(".")[:2])


@pytest.mark.skipif(mujoco_version() < (3, 5), reason="needs MuJoCo >= 3.5")
@pytest.mark.parametrize("robot, name", [("hopper", "Hopper-v4"), ("ant", "Ant-v4")])
def test_without_the_correction_the_step_is_wrong(robot, name):
    absolute, relative = replay_errors(gymnasium.make(name), robot)
    assert absolute.max() > 1e-2 and np.median(relative) > 1e-2  # with it: 1e-6


@pytest.mark.parametrize("version", ["3.4.1", "3.5.0", "3.17.0", "4.0.0"])
@pytest.mark.parametrize("name", ["Hopper-v4", "Ant-v4", "Walker2d-v4", "HalfCheetah-v4"])
def test_margins_are_halved_where_mujoco_adds_them(name, version, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mujoco, "__version__", version)
    shipped = gymnasium.make(name).unwrapped.model.geom_margin
    env = make_env(name.split("-")[0].lower())
    halved = name in ("Hopper-v4", "Ant-v4") and version != "3.4.1"
    assert env.spec.id == name and np.array_equal(env.unwrapped.model.geom_margin, shipped * (0.5 if halved else 1))
    assert (shipped > 0).any() or not halved


@pytest.mark.parametrize("domain", ["hopper", "halfcheetah", "walker2d", "ant"])
def test_environment_fits_the_data(domain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task = parse_task(f"{domain}-medium")
    env = make_env(task)
    assert (*env.observation_space.shape, *env.action_space.shape) == utils.WIDTHS[domain]
    assert (env.action_space.low == -1).all() and (env.action_space.high == 1).all()
    assert env.spec.max_episode_steps == task.max_steps


def test_task_without_environment():
    with pytest.raises(UserError, match=r"no evaluation environment.*--eval-episodes 0"):
        make_env(parse_task("antmaze-umaze"))


# --- evaluation ---


class Countdown(gymnasium.Env):
    """Ends after `seed` steps, by terminal if even, by time limit if odd; pays the action; must not be stepped after its end."""

    def reset(self, seed=None, options=None):
        self.left, self.even = seed, seed % 2 == 0
        return np.full(2, self.left, np.float64), {}

    def step(self, action):
        assert self.left > 0, "stepped after its end"
        self.left -= 1
        over = self.left == 0
        return np.full(2, self.left, np.float64), float(action[0]), over and self.even, over and not self.even, {}


def test_evaluate_by_hand():
    seen = []

    def act(obs):
        seen.append(obs.clone())
        return obs[:, :1]  # pays what is left: episode of length n returns n (n + 1) / 2

    rewards = []
    returns, lengths = evaluate([Countdown() for _ in range(4)], act, seed=2, rewards=rewards)
    assert [r.tolist() for r in rewards] == [[2, 1], [3, 2, 1], [4, 3, 2, 1], [5, 4, 3, 2, 1]]
    assert lengths.tolist() == [2, 3, 4, 5] and returns.tolist() == [3, 6, 10, 15]
    assert [len(obs) for obs in seen] == [4, 4, 3, 2, 1] and seen[2].tolist() == [[1, 1], [2, 2], [3, 3]]
    assert all(obs.dtype == torch.float32 for obs in seen)


def test_batched_episodes_equal_single_ones():
    def act(obs):
        assert not torch.is_grad_enabled()
        return obs[:, -3:].clamp(-1, 1)  # entry by entry, so that rounding does not depend on the batch

    envs = [make_env("hopper") for _ in range(4)]
    returns, lengths = evaluate(envs, act, seed=10)
    single = [evaluate(envs[:1], act, seed=10 + i) for i in range(4)]
    assert returns.tolist() == [r[0] for r, _ in single] and lengths.tolist() == [n[0] for _, n in single]
    assert len(set(returns)) == 4  # each has its own seed
    assert evaluate(envs, act, seed=10)[0].tolist() == returns.tolist()


def test_evaluate_leaves_the_random_numbers_alone():
    torch.manual_seed(3)
    expected = torch.rand(5)
    torch.manual_seed(3)
    evaluate([Countdown()], lambda obs: torch.randn(len(obs), 1), seed=4)
    assert torch.equal(torch.rand(5), expected)


def test_antmaze_terminal_rows_have_a_successor(tmp_path):
    """The ant ran on behind the goal while the data was recorded: without that successor no model would see a reward."""
    n, rng = 20, np.random.default_rng(0)
    obs = rng.normal(size=(n, 29)).astype("f4")
    terminals, timeouts = np.isin(np.arange(n), (5, 6, 19)), np.isin(np.arange(n), (9, 19))
    with h5py.File(tmp_path / "a.hdf5", "w") as f:
        f["observations"], f["actions"], f["rewards"] = obs, rng.uniform(-1, 1, (n, 8)).astype("f4"), terminals.astype("f4")
        f["terminals"], f["timeouts"] = terminals, timeouts
    data = utils.load_dataset(utils.parse_task("antmaze-umaze"), str(tmp_path / "a.hdf5"))
    assert len(data) == 19  # the time limit goes, the terminal last row stays for Q learning
    assert data.terminated.nonzero().flatten().tolist() == [5, 6, 18] and (~data.has_next).nonzero().flatten().tolist() == [18]
    np.testing.assert_array_equal(data.next_obs[5:7], obs[6:8])
