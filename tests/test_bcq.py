"""Facts about ROMI-BCQ and FOMI-BCQ: BCQ's targets and losses by hand, and the direction of time in imagined chains."""

import json
from dataclasses import replace

import fomi_bcq
import pytest
import romi_bcq
import torch

import utils
from utils import Dataset, pack, parse_task, unpack

CPU = torch.device("cpu")
ARGS = romi_bcq.Args(dynamics_hidden=32, hidden=(16, 16), vae_hidden=32, bcq_samples=4, eval_samples=8, batch_size=20)
ARGS = replace(ARGS, horizon=3, model_ratio=0.7, rollout_policy="uniform", rollout_batch_size=100, lr=1e-2)
BOTH = pytest.mark.parametrize("m", [romi_bcq, fomi_bcq])


@pytest.fixture(autouse=True)
def seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def agent():
    agent = romi_bcq.BCQ(4, 2, ARGS, CPU)
    for p in [*agent.target_qf.parameters(), *agent.target_perturb.parameters()]:
        p.add_(0.1)  # target networks of their own
    return agent


def batch(n=3):
    return torch.randn(n, 4), 2 * torch.rand(n, 2) - 1, torch.randn(n), torch.randn(n, 4), torch.zeros(n)


def test_soft_clipped_value_by_hand():
    q = torch.tensor([[[1.0, 5.0], [0.0, -2.0]], [[3.0, -3.0], [0.0, 2.0]]])  # (2, B, N)
    # (1, 3) -> 1.5, (5, -3) -> -1; (0, 0) -> 0, (-2, 2) -> -1: the best action after the soft clip, of the same state
    assert romi_bcq.soft_clipped_value(q, 0.75).tolist() == [1.5, 0.0]


@pytest.mark.parametrize("n", [1, 3])
def test_target_by_hand(agent, n):
    """A terminal row does not bootstrap."""
    obs, act, rew, next_obs, terminated = batch(n)
    terminated[0] = 1
    torch.manual_seed(1)
    loss, _ = agent.critic_loss(obs, act, rew, next_obs, terminated)
    torch.manual_seed(1)
    latents = torch.randn(n * 4, 4).clamp(-0.5, 0.5).view(n, 4, 4)
    by_hand = 0.0
    for i in range(n):
        values = []
        for z in latents[i]:
            a = agent.vae.decode(next_obs[i], z)
            xi = 0.05 * agent.target_perturb.net(torch.cat([next_obs[i], a])).tanh()
            q1, q2 = agent.target_qf(next_obs[i][None], (a + xi).clamp(-1, 1)[None])[:, 0].tolist()
            values.append(0.75 * min(q1, q2) + 0.25 * max(q1, q2))
        target = rew[i] + 0.99 * (1 - terminated[i]) * max(values)
        by_hand += (agent.qf(obs[i][None], act[i][None])[:, 0] - target).square().sum() / n
    torch.testing.assert_close(loss, by_hand, rtol=1e-4, atol=1e-4)


def test_perturbation_is_small_and_stays_in_the_box(agent):
    obs, act, *_ = batch(500)
    moved = agent.perturb(100 * obs, act)
    assert (moved - act).abs().max() <= 0.05 + 1e-6 and moved.abs().max() <= 1 and (moved != act).any()


def test_perturbation_follows_q1_of_one_generated_action_per_state(agent):
    obs = torch.randn(5, 4)
    torch.manual_seed(1)
    loss = agent.perturb_loss(obs)
    torch.manual_seed(1)
    act = agent.perturb(obs, agent.vae.sample(obs))
    torch.testing.assert_close(loss, -agent.qf.q1(torch.cat([obs, act], 1)).mean())
    loss.backward()
    untouched = [*agent.vae.parameters(), *agent.qf.q2.parameters()]
    assert all(p.grad is None or not p.grad.any() for p in untouched) and agent.perturb.net[0].weight.grad.any()


@pytest.mark.parametrize("frozen", ["vae", "perturb", "qf"])
def test_every_optimizer_moves_its_own_parameters(agent, frozen):
    def parameters():
        return {k: [p.detach().clone() for p in getattr(agent, k).parameters()] for k in ("vae", "perturb", "qf")}

    getattr(agent, f"{frozen}_opt").param_groups[0]["lr"] = 0.0
    before = parameters()
    agent.update(*batch())
    stayed = {k for k, v in parameters().items() if all(a.equal(b) for a, b in zip(v, before[k], strict=True))}
    assert stayed == {frozen}


def test_targets_follow_slowly(agent):
    targets = [*agent.target_qf.parameters(), *agent.target_perturb.parameters()]
    before = [p.clone() for p in targets]
    agent.update(*batch())
    online = [*agent.qf.parameters(), *agent.perturb.parameters()]
    for old, new, target in zip(before, online, targets, strict=True):
        torch.testing.assert_close(target, old + 0.005 * (new.detach() - old))


def test_acting_takes_the_best_of_many_actions_for_each_state(agent):
    obs = torch.randn(3, 4)
    torch.manual_seed(1)
    act = agent.act(obs)
    torch.manual_seed(1)
    rep = obs.repeat_interleave(8, 0)
    candidates = agent.perturb(rep, agent.vae.sample(rep)).view(3, 8, 2)
    for i in range(3):
        q = agent.qf.q1(torch.cat([obs[i].expand(8, -1), candidates[i]], 1))[:, 0]
        torch.testing.assert_close(act[i], candidates[i, q.argmax()])


def test_bfloat16_is_close_update_after_update():
    """With a large step size, so that a stale bfloat16 copy of a network's weights would show."""
    full, half = (romi_bcq.BCQ(4, 2, replace(ARGS, bf16=bf16, lr=0.01, tau=0.5), CPU) for bf16 in (False, True))
    for name, part in half.parts.items():
        part.load_state_dict(full.parts[name].state_dict())
    rows = batch(64)
    for _ in range(5):
        out = []
        for a in (full, half):
            torch.manual_seed(1)
            out.append(torch.stack(list(a.update(*rows).values())))
        torch.testing.assert_close(*out, rtol=0.05, atol=0.05)
        assert (out[0] != out[1]).any() and out[1].dtype == torch.float32
    x = torch.tensor([[9.0, 9.0], [9.01, 9.01]])  # at the goal of the large maze: one point in bfloat16
    net = romi_bcq.mlp(2, 8, 8, 1)
    with half.autocast():
        first, hidden, last = net[0](x), net[2](net[0](x)), net[4](x.repeat(1, 4))
    assert (first[0] != first[1]).all() and (last != last.bfloat16()).any()  # these are not rounded
    assert [y.dtype for y in (first, hidden, last)] == [torch.float32, torch.bfloat16, torch.float32]


@BOTH
def test_update_trains_the_generator_on_the_whole_batch_of_real_and_imagined_rows(m):
    agent, seen, rows = m.BCQ(4, 2, ARGS, CPU), [], batch(10)
    plain = agent.vae_loss
    agent.vae_loss = lambda obs, act: seen.append((obs, act)) or plain(obs, act)
    agent.update(*rows)
    assert len(seen) == 1 and seen[0][0].equal(rows[0]) and seen[0][1].equal(rows[1])


@BOTH
def test_settings_of_the_tasks_and_defaults(m):
    """wenzhe-li/romi: train_bcq.py; BCQ: sfujim/BCQ."""

    def settings(name):
        a = m.resolve(m.Args(env=name), parse_task(name))
        return a.horizon, a.model_ratio, a.rollout_policy, a.priority_rollout, a.priority_policy

    for maze, ratio in (("umaze", 0.7), ("medium", 0.5), ("large", 0.3)):
        for suffix in ("", "-dense"):
            assert settings(f"maze2d-{maze}{suffix}") == (5, ratio, "uniform", False, False)
    assert settings("antmaze-medium-play") == (5, 0.1, "cvae", True, True)
    assert settings("hopper-medium-replay") == (5, 0.1, "uniform", True, True)
    for robot in ("halfcheetah", "walker2d", "ant"):
        assert settings(f"{robot}-medium") == (1, 0.1, "cvae", True, True)
    model = dict(ensemble_size=7, num_elites=5, dynamics_hidden=200, dynamics_batch_size=256, dynamics_lr=1e-3)
    model |= dict(model_buffer_size=4_000_000, rollout_policy_updates=500_000, kl_weight=0.5, latent_clip=0.5)
    bcq = dict(total_updates=1_000_000, batch_size=100, gamma=0.99, tau=0.005, lr=1e-3, lmbda=0.75, phi=0.05)
    bcq |= dict(hidden=(400, 300), vae_hidden=750, bcq_samples=10, eval_samples=100)
    assert vars(m.Args()) == vars(m.Args()) | model | bcq


class Stop(Exception):
    pass


def run_main(m, data, monkeypatch, tmp_path, **changes):
    """main() on the given data, without evaluations"""
    changes = {"env": "halfcheetah-medium", "priority_rollout": False, "priority_policy": False} | changes
    args = replace(m.Args(), run_dir=str(tmp_path), num_threads=1, eval_episodes=0, dynamics_hidden=32, **changes)
    monkeypatch.setattr(m, "load_dataset", lambda task, source: data)
    m.main(replace(args, vae_hidden=8, rbc_hidden=8, hidden=(8, 8), horizon=3, rollout_batch_size=100))


def data_of(obs, act, rew, next_obs, has_next=None, trajectory=None):
    n = len(obs)
    has_next = torch.ones(n, dtype=torch.bool) if has_next is None else has_next
    trajectory = torch.arange(n) if trajectory is None else trajectory
    return Dataset(obs, act, rew, next_obs, torch.zeros(n), has_next, trajectory)


@BOTH
@pytest.mark.parametrize("policy", ["cvae", "rbc", "uniform"])
@pytest.mark.parametrize("priority", [True, False])
def test_rollout_policy_and_start_states_are_those_asked_for(m, policy, priority, monkeypatch, tmp_path):
    """And rows without a successor teach the models nothing."""
    n, trajectory = 200, torch.arange(200) // 100  # the first trajectory earns nothing, the second something
    obs, act, has_next = torch.randn(n, 2), 2 * torch.rand(n, 2) - 1, torch.arange(n) % 10 < 9
    next_obs = torch.where(has_next[:, None], obs + 0.1, 1e6)
    data, seen, plain = (
        data_of(obs, act, trajectory.float(), next_obs, has_next, trajectory),
        {},
        m.train_rollout_policy,
    )
    a, s, s2 = (x[has_next] for x in (act, obs, next_obs))
    cond, pred = (s2, s) if m is romi_bcq else (s, s2)  # an imagined step starts from the former

    def imagine(starts, dynamics, policy, terminates, args):
        seen.update(starts=starts, policy=policy)
        raise Stop

    def taught(*given):
        assert all(x.equal(y) for x, y in zip(given[:2], (cond, a), strict=True))
        return plain(*given)

    monkeypatch.setattr(m, "train_dynamics", lambda *given: seen.update(taught=given))
    monkeypatch.setattr(m, "train_rollout_policy", taught)
    monkeypatch.setattr(m, "imagine", imagine)
    with pytest.raises(Stop):
        flags = dict(rollout_policy=policy, priority_rollout=priority, rollout_policy_updates=3)
        run_main(m, data, monkeypatch, tmp_path, **flags)
    assert all(x.equal(y) for x, y in zip(seen["taught"], (cond, a, trajectory[has_next].float(), pred), strict=False))
    classes = {"cvae": m.ConditionalVAE, "rbc": m.BehaviourCloning, "uniform": type(None)}
    assert type(getattr(seen["policy"], "__self__", None)) is classes[policy]
    late = (seen["starts"](4000)[:, None] == obs[100:]).all(-1).any(1).float().mean()
    assert late == pytest.approx(1.0 if priority else 0.5, abs=0.0 if priority else 0.05)


@BOTH
def test_what_a_maze_run_logs_and_draws_of_its_imagination_runs_forward_in_time(m, monkeypatch, tmp_path):
    from envs.maze2d import Maze2d

    h, n, env = 3, 20, Maze2d("umaze")
    obs, act, next_obs = torch.zeros(h, n, 4), 2 * torch.rand(h, n, 2) - 1, torch.zeros(h, n, 4)
    for c in range(n):
        state = env.reset(seed=c)[0]
        for t in range(h):
            obs[t, c] = torch.as_tensor(state)
            state = env.step(act[t, c].numpy())[0]
            next_obs[t, c] = torch.as_tensor(state)
    chains, drawn = [[obs[t], act[t], next_obs[t]] for t in range(h)], {}
    rows = torch.cat([pack(s, a, torch.zeros(n), s2, torch.zeros(n)) for s, a, s2 in chains])
    monkeypatch.setattr(m, "train_dynamics", lambda *_: None)  # the chains come in the order of imagination
    monkeypatch.setattr(m, "imagine", lambda *_: (rows, chains[::-1] if m is romi_bcq else chains))
    monkeypatch.setattr(utils, "draw_maze", lambda task, trajectories, folder, name: drawn.update({name: trajectories}))
    data = data_of(obs[0], act[0], torch.zeros(n), next_obs[0])
    run_main(m, data, monkeypatch, tmp_path, env="maze2d-umaze", total_updates=1)
    logged = json.loads(next(tmp_path.glob("*/metrics.jsonl")).read_text().splitlines()[0])
    assert logged["update"] == 0 and logged["model/replay_error_1"] < 1e-6 and logged["model/replay_error_3"] < 1e-6
    assert (torch.as_tensor(drawn["imagination"]) == torch.cat([obs, next_obs[-1:]]).transpose(0, 1)).all()


@BOTH
def test_chains_touch_the_data_at_their_end_or_at_their_begin(m, monkeypatch, tmp_path):
    """ROMI's chains lead to states of the data, FOMI's away from them; the stored rows of both run forward in time."""
    obs, act = torch.randn(2000, 2), 2 * torch.rand(2000, 2) - 1
    data, imagined, plain = data_of(obs, act, obs[:, 0].clone(), obs + 0.1 * act), [], m.imagine

    def imagine(*args):
        imagined.append(plain(*args)[0])
        raise Stop

    monkeypatch.setattr(m, "imagine", imagine)
    with pytest.raises(Stop):
        flags = dict(rollout_policy="uniform", dynamics_max_epochs=30, model_buffer_size=600)
        run_main(m, data, monkeypatch, tmp_path, **flags)
    s, a, _, s2, terminated = (x.view(2, 3, 100, -1) for x in unpack(imagined[0], 2, 2))  # (calls, h, chains, ...)
    assert (s + 0.1 * a - s2).abs().mean() < 0.03 and terminated.sum() == 0
    in_data = {tuple(x) for x in obs.tolist()}
    touching, loose = (s2, s) if m is romi_bcq else (s, s2)
    assert all(tuple(x) in in_data for x in touching[:, 0].flatten(0, 1).tolist())
    assert not any(tuple(x) in in_data for x in loose.flatten(0, 2).tolist())
    for i in (1, 2):
        assert s2[:, i].equal(s[:, i - 1]) if m is romi_bcq else s[:, i].equal(s2[:, i - 1])


@pytest.mark.parametrize("m, ended", [(romi_bcq, "given"), (fomi_bcq, "imagined")])
def test_termination_is_about_the_later_state_and_a_small_buffer_still_holds_whole_chains(m, ended):
    """Fewer rows than horizon x rollout batch: fewer chains, not shorter ones."""
    args, seen = replace(m.Args(), horizon=5, model_buffer_size=50, rollout_batch_size=1000, dynamics_hidden=8), []

    def terminates(obs, act, next_obs):
        seen.append(next_obs)
        return torch.zeros(len(obs), dtype=torch.bool)

    policy = m.train_rollout_policy(torch.zeros(1, 2), torch.zeros(1, 2), replace(args, rollout_policy="uniform"), None)
    starts = m.row_sampler(torch.full((5, 2), 7.0))
    rows, chains = m.imagine(starts, m.Dynamics(2, 2, args), policy, terminates, args)
    assert (seen[0] == 7).all().item() == (ended == "given")
    obs, _, _, next_obs, _ = (x.view(5, 10, -1) for x in unpack(rows, 2, 2))
    later, earlier = (obs, next_obs) if ended == "given" else (next_obs, obs)
    assert all(earlier[i].equal(later[i - 1]) for i in range(1, 5)) and len(chains) == 5
