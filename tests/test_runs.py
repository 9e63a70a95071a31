"""Runs of the scripts in this process: what they leave behind, and what becomes of one that is interrupted."""

import importlib
import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from torch import nn

from utils import UserError, load_dataset, pack, parse_task, unpack

ROOT = Path(__file__).resolve().parents[1]
SMALL = dict(total_updates=30, eval_every=15, log_every=5, checkpoint_every=10, eval_episodes=1, num_threads=1)
SMALL |= dict(ensemble_size=3, num_elites=2, dynamics_hidden=16, dynamics_max_epochs=4, hidden=(16, 16), batch_size=20)
ONCE = dict(model_buffer_size=3000, rollout_batch_size=500, rollout_policy="cvae", vae_hidden=16)  # imagination
ONCE |= dict(rollout_policy_updates=30)
AGAIN = dict(rollout_every=8, rollout_starts=100, rollouts_kept=2)  # and again, four times in a run
BCQ = ("bcq", "BCQ", ONCE | dict(bcq_samples=2, eval_samples=4), lambda step: ())
# script -> name without the model, class of the learner, flags that make it small, what update takes beside the batch
SCRIPTS = {
    "romi_cql": ("cql", "CQL", ONCE | dict(cql_samples=2, bc_warmup=10), lambda step: (step <= 10,)),
    "romi_bcq": BCQ,
    "fomi_bcq": BCQ,
    "mopo": ("sac", "SAC", AGAIN, lambda step: (step,)),
    "combo": ("combo_cql", "COMBO", AGAIN | dict(cql_samples=2), lambda step: (20, step)),
}
ROMI = ["romi_cql", "romi_bcq", "fomi_bcq"]


@pytest.fixture(scope="module", params=SCRIPTS)
def script(request):
    return request.param


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    """A hopper-like file: 40 episodes of 50 steps, some terminal, some cut by the clock."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("data") / "small.hdf5"
    obs = 0.005 * rng.normal(size=(40, 50, 11)).cumsum(1).reshape(2000, 11)
    obs[:, 0] += 1.2
    ends = np.arange(2000) % 50 == 49
    terminals = ends & (np.arange(2000) % 100 == 99)
    with h5py.File(path, "w") as f:
        f["observations"], f["actions"] = obs.astype("f4"), rng.uniform(-1, 1, (2000, 3)).astype("f4")
        f["rewards"], f["terminals"], f["timeouts"] = rng.normal(size=2000).astype("f4"), terminals, ends & ~terminals
    return path


def folder_of(run_dir, name):
    return run_dir / f"hopper-medium-replay-v2__{name}__0__small"


def arguments(script, data_file, run_dir, **flags):
    flags = {"dataset": str(data_file), "run_dir": str(run_dir), "env": "hopper-medium-replay"} | flags
    return importlib.import_module(script).Args(**SMALL | SCRIPTS[script][2] | flags)


def run(script, data_file, run_dir, **flags):
    importlib.import_module(script).main(arguments(script, data_file, run_dir, **flags))
    return folder_of(run_dir, flags.get("exp_name", script))


def leaves(x, path=""):
    if isinstance(x, dict | list | tuple):
        pairs = x.items() if isinstance(x, dict) else enumerate(x)
        return {k: v for key, y in pairs for k, v in leaves(y, f"{path}/{key}").items()}
    return {path: x}


def weights(folder, phases="*"):
    states = {p.name: torch.load(p, weights_only=True) for p in folder.glob(f"{phases}.pt")}
    return {k: v for k, v in leaves(states).items() if isinstance(v, torch.Tensor)}


def assert_same_weights(x, y):
    assert x.keys() == y.keys() and len(x) > 20
    assert not [k for k in x if not torch.equal(x[k], y[k])]


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "charts/SPS"} for row in rows]


def assert_same_run(a, b):
    assert_same_weights(weights(a), weights(b))
    assert metrics(a) == metrics(b)


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


@pytest.fixture(scope="module")
def whole(script, data_file, tmp_path_factory):
    """The run that nothing interrupts."""
    return run(script, data_file, tmp_path_factory.mktemp("whole"))


def test_a_run_leaves_what_the_contract_names(script, whole):
    config, result = (json.loads((whole / f"{n}.json").read_text()) for n in ("config", "result"))
    assert config["args"]["horizon"] == 5 and config["args"]["exp_name"] == script  # resolved values
    assert config["script"] == result["script"] == f"{script}.py"
    assert result["updates"] == 30 and result["task"] == "hopper-medium-replay-v2" and result["algorithm"] == script
    assert result["dataset"]["transitions"] == config["dataset"]["transitions"] and result["wall_time_s"] > 0
    assert result["normalized_score"] == pytest.approx(100 * (result["return_mean"] + 20.272305) / 3254.572305)
    rows = metrics(whole)
    scores = [r["eval/normalized_score"] for r in rows if "eval/return" in r]
    assert [r["update"] for r in rows if "eval/return" in r] == [15, 30] and scores[1] == result["normalized_score"]
    assert result["normalized_score_last_10"] == pytest.approx(sum(scores) / 2)
    losses = [r["update"] for r in rows if any(k.startswith("losses/") for k in r)]
    assert [update for update in losses if update] == [5, 10, 15, 20, 25, 30]
    imagined = sum("model/imagined_reward_min" in r for r in rows)
    assert sum("model/epoch" in r for r in rows) == 4 and imagined == (1 if script in ROMI else 4)
    phases = {"dynamics.pt", "agent.pt"} | ({"rollout_policy.pt"} if script in ROMI else set())
    assert {p.name for p in whole.iterdir()} == phases | {"config.json", "result.json", "metrics.jsonl"}


def interrupt(phase, at, script, *rest, **flags):
    """A run that is interrupted within a step of a phase, or at the call of a function."""
    plain = (m := importlib.import_module(script)).Run.steps

    def steps(self, name, *rest, **parts):
        for step in plain(self, name, *rest, **parts):
            yield step
            if (name, step) == (phase, at):
                raise KeyboardInterrupt

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(*((m.Run, "steps", steps) if at else (m if phase == "imagine" else m.Run, phase, stop)))
        run(script, *rest, **flags)


def test_a_run_interrupted_in_every_phase_equals_one_left_alone(script, whole, data_file, tmp_path):
    """Before a phase's first checkpoint, after one with work done since that is lost, before the last, and after it."""
    steps = [("dynamics", 1), ("dynamics", 3), ("rollout_policy", 5), ("rollout_policy", 25), ("imagine", 0)]
    for phase, at in [*steps, ("agent", 5), ("agent", 25), ("agent", 30), ("finish", 0)]:
        if script in ROMI or phase != "rollout_policy":
            interrupt(phase, at, script, data_file, tmp_path)
            assert not (tmp_path / whole.name / "result.json").exists()
    folder = run(script, data_file, tmp_path)
    assert_same_run(whole, folder)
    a, b = (json.loads((f / "result.json").read_text()) for f in (whole, folder))
    assert a | {"wall_time_s": 0, "updates_per_s": 0} == b | {"wall_time_s": 0, "updates_per_s": 0}


def test_without_the_model_it_is_the_base_learner(script, data_file, tmp_path):
    """The same updates as the learner alone, fed from the real rows: no other path, no other random numbers."""
    name, learner, _, extra = SCRIPTS[script]
    flags, folder = dict(model_ratio=0.0, eval_episodes=0), folder_of(tmp_path, name)
    run(script, data_file, tmp_path, **flags)
    assert not any(k.startswith(("model/", "eval/")) for row in metrics(folder) for k in row)
    assert json.loads((folder / "result.json").read_text())["normalized_score"] is None
    m, task = importlib.import_module(script), parse_task("hopper-medium-replay")
    args = m.resolve(arguments(script, data_file, tmp_path, **flags), task)
    data = load_dataset(task, str(data_file))
    torch.manual_seed(3)
    agent = getattr(m, learner)(11, 3, args, torch.device("cpu"))
    rows = pack(data.obs, data.act, data.rew, data.next_obs, data.terminated)
    sample = m.row_sampler(rows, data.trajectory_returns()) if script in ROMI else lambda size: m.draw(rows, size)
    for step in range(1, 31):
        agent.update(*unpack(sample(20), 11, 3), *extra(step))
    targets = [p for k, part in agent.parts.items() if k.startswith("target_") for p in part.parameters()]
    assert targets and not any(p.requires_grad for p in targets)  # in the graph, one would keep every update it saw
    mine = leaves({"agent.pt": {k: part.state_dict() for k, part in agent.parts.items()}})
    saved = {k: v for k, v in weights(folder).items() if "/rng/" not in k}
    assert_same_weights(saved, {k: v for k, v in mine.items() if isinstance(v, torch.Tensor)})


@pytest.mark.parametrize("script", ROMI)
def test_batches_are_split_exactly(script, data_file, tmp_path, monkeypatch):
    m, sizes = importlib.import_module(script), []
    learner = getattr(m, SCRIPTS[script][1])
    plain, sevens = learner.update, torch.cat([torch.full((100, 1), 7.0), torch.zeros(100, 26)], 1)

    def update(self, obs, *rest):
        sizes.append(((obs[:, 0] == 7).sum().item(), len(obs)))
        return plain(self, obs, *rest)

    monkeypatch.setattr(learner, "update", update)
    for name in ("train_dynamics", "train_rollout_policy"):
        monkeypatch.setattr(m, name, lambda *_: None)
    monkeypatch.setattr(m, "imagine", lambda *_: (sevens, []))
    run(script, data_file, tmp_path, model_ratio=0.7, eval_episodes=0)
    assert set(sizes) == {(14, 20)}
    assert (sevens[:, 0] == 7).all() and not sevens[:, 1:].any()  # learning from imagined rows writes none


def test_steps_yields_what_is_left_and_restores_objects_and_random_numbers(tmp_path):
    m = importlib.import_module("romi_cql")

    def new():
        about = {"name": "run", "script": "romi_cql.py", "device": "cpu", "wandb_id": "", "args": {}}
        return m.Run(m.Args(run_dir=str(tmp_path)), about | {"dataset": {"transitions": 1}}), nn.Linear(1, 1)

    (first, net), draws = new(), []
    begin = net.weight.item()
    for step in first.steps("phase", 10, 4, net=net):
        net.weight.data += 1
        draws.append(torch.rand(()).item())
        if step == 6:
            with pytest.raises(UserError, match="another process is training in it"):
                new()
            break
    del first  # closes the log, which is locked
    (second, other), steps = new(), []
    for step in second.steps("phase", 10, 4, net=other):
        other.weight.data += 1
        steps.append((step, torch.rand(()).item()))
    assert [step for step, _ in steps] == [5, 6, 7, 8, 9, 10] and [draw for _, draw in steps[:2]] == draws[4:]
    assert other.weight.item() == pytest.approx(begin + 10) and len(set(draws)) == 6
    del second
    third, net = new()
    assert list(third.steps("phase", 10, 4, net=net)) == [] and net.weight.equal(other.weight)
    assert next(step for step in third.steps("endless", None, 1, net=net) if step == 50) == 50
    del third
    with pytest.raises(UserError, match=r"phase\.pt has 10 steps already, more than the requested 9"):
        list(new()[0].steps("phase", 9, 4, net=net))


@pytest.fixture(scope="module")
def romi(data_file, tmp_path_factory):
    return run("romi_cql", data_file, tmp_path_factory.mktemp("romi"))


def shorter(data_file, folder):
    with h5py.File(folder / data_file.name, "w") as other, h5py.File(data_file) as f:
        for name in f:
            other[name] = f[name][:1900]
    return str(folder / data_file.name)


def test_a_finished_run_is_left_alone_and_more_updates_carry_it_on(romi, data_file, tmp_path, capsys):
    folder = run("romi_cql", data_file, tmp_path, total_updates=20)
    before = contents(folder)
    capsys.readouterr()
    run("romi_cql", f"{data_file.parent}/../{data_file.parent.name}/{data_file.name}", tmp_path, total_updates=20)
    assert "is finished" in capsys.readouterr().out
    for flags, words in (
        (dict(gamma=0.9), r"--gamma \(0.99 there\)"),
        (dict(total_updates=10), "more than the requested 10"),
    ):
        with pytest.raises(UserError, match=words):
            run("romi_cql", data_file, tmp_path, **dict(total_updates=20) | flags)
    with pytest.raises(UserError, match="differing in data"):
        run("romi_cql", shorter(data_file, tmp_path), tmp_path, total_updates=20)
    assert contents(folder) == before
    longer = run("romi_cql", data_file, tmp_path, checkpoint_every=7)  # 30 updates
    assert_same_weights(weights(romi, "agent"), weights(longer, "agent"))


def test_a_model_is_taken_from_another_run_if_it_is_the_same_and_trained_on_if_unfinished(romi, data_file, tmp_path):
    model = romi / "dynamics.pt"
    folder = run("romi_cql", data_file, tmp_path, dynamics_from=str(model), exp_name="borrowed")
    assert not any("model/epoch" in row for row in metrics(folder))
    assert_same_weights(weights(romi, "agent"), weights(folder, "agent"))  # nothing else changes
    before = contents(folder)
    run(
        "romi_cql", data_file, tmp_path, dynamics_from="gone.pt", exp_name="borrowed"
    )  # finished, whatever became of it
    assert contents(folder) == before
    interrupt("dynamics", 3, "romi_cql", data_file, tmp_path, exp_name="unfinished")
    flags = dict(dynamics_from=str(folder_of(tmp_path, "unfinished") / "dynamics.pt"), exp_name="taught")
    interrupt("dynamics", 4, "romi_cql", data_file, tmp_path, **flags)
    folder = run("romi_cql", data_file, tmp_path, **flags)
    assert [row["model/epoch"] for row in metrics(folder) if "model/epoch" in row] == [3, 4]
    assert_same_weights(weights(romi), weights(folder))


def test_a_model_of_another_kind_is_refused(romi, data_file, tmp_path):
    for script, flags, words in (
        ("romi_cql", dict(seed=1), r"--dynamics-from .* differs in seed \(0, here 1\)"),
        ("romi_bcq", dict(dynamics_hidden=8), r"differs in dynamics_hidden \(16, here 8\)"),
        ("fomi_bcq", {}, r"differs in direction \(reverse, here forward\)"),
        ("romi_cql", dict(dataset=shorter(data_file, tmp_path)), "differ.* data"),
        (
            "romi_cql",
            dict(dynamics_max_epochs=3),
            "dynamics.pt of run .*__romi_cql__0__.* has 4 steps already, more than the requested 3",
        ),
        ("romi_cql", dict(dynamics_from="none.pt"), "--dynamics-from none.pt: no such file"),
    ):
        with pytest.raises(UserError, match=words):
            run(script, data_file, tmp_path / words, **dict(dynamics_from=str(romi / "dynamics.pt")) | flags)
