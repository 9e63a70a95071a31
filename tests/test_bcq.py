"""Facts about ROMI-BCQ and FOMI-BCQ: BCQ's targets and losses by hand, and the direction of time in imagined chains."""

from dataclasses import replace

import fomi_bcq
import pytest
import romi_bcq
import torch

from utils import Dataset, parse_task

CPU = torch.device("cpu")
ARGS = romi_bcq.Args(
    exp_name="test", dynamics_hidden=32, hidden=(16, 16), vae_hidden=32, bcq_samples=4, eval_samples=8, batch_size=20, model_ratio=0.7,
    horizon=3, rollout_policy="uniform", model_buffer_size=1000, rollout_batch_size=100, lr=1e-2, phi=0.05,
)  # fmt: skip


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def agent():
    agent = romi_bcq.BCQ(4, 2, ARGS, CPU)
    for p in [*agent.target_qf.parameters(), *agent.target_perturb.parameters()]:
        p.add_(0.1)  # target networks of their own
    return agent


def batch(n=3, terminated=0.0):
    return torch.randn(n, 4), 2 * torch.rand(n, 2) - 1, torch.randn(n), torch.randn(n, 4), torch.full((n,), terminated)


def test_soft_clipped_value_by_hand():
    q = torch.tensor([[[1.0, 5.0], [0.0, -2.0]], [[3.0, -3.0], [0.0, 2.0]]])  # (2, B, N)
    # (1, 3) -> 1.5, (5, -3) -> -1; (0, 0) -> 0, (-2, 2) -> -1: the best action after the soft clip, of the same state
    assert romi_bcq.soft_clipped_value(q, 0.75).tolist() == [1.5, 0.0]


@pytest.mark.parametrize("n", [1, 3])
def test_target_by_hand(agent, n):
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


def test_a_terminal_row_does_not_bootstrap(agent):
    obs, act, rew, next_obs, terminated = batch(terminated=1.0)
    loss, _ = agent.critic_loss(obs, act, rew, next_obs, terminated)
    torch.testing.assert_close(loss, (agent.qf(obs, act) - rew).square().mean(1).sum())


def test_perturbation_is_small_and_stays_in_the_box(agent):
    obs, act, *_ = batch(500)
    moved = agent.perturb(100 * obs, act)
    assert (moved - act).abs().max() <= 0.05 + 1e-6 and moved.abs().max() <= 1 and (moved != act).any()
    assert romi_bcq.BCQ(4, 2, replace(ARGS, phi=0.0), CPU).perturb(obs, act).equal(act)


def test_perturbation_follows_q1_of_one_generated_action_per_state(agent):
    obs = torch.randn(5, 4)
    torch.manual_seed(1)
    loss = agent.perturb_loss(obs)
    torch.manual_seed(1)
    torch.testing.assert_close(loss, -agent.qf.q1(torch.cat([obs, agent.perturb(obs, agent.vae.sample(obs))], 1)).mean())
    loss.backward()
    untouched = [*agent.vae.parameters(), *agent.qf.q2.parameters()]
    assert all(p.grad is None or not p.grad.any() for p in untouched) and agent.perturb.net[0].weight.grad.any()


def test_every_optimizer_moves_its_own_parameters(agent):
    names = ("vae", "perturb", "qf")
    for frozen in names:
        agent = romi_bcq.BCQ(4, 2, ARGS, CPU)
        for group in getattr(agent, f"{frozen}_opt").param_groups:
            group["lr"] = 0.0
        before = {k: [p.detach().clone() for p in getattr(agent, k).parameters()] for k in names}
        agent.update(*batch())
        moved = {k for k in names if any(not a.equal(b) for a, b in zip(before[k], getattr(agent, k).parameters(), strict=True))}
        assert moved == set(names) - {frozen}


def test_generator_learns_from_the_whole_batch(agent):
    """In ROMI-BCQ it imitates imagined actions too: both halves of a batch change its gradient."""
    obs, act, *_ = batch(10)
    grads = []
    for change in (slice(0, 0), slice(0, 5), slice(5, 10)):
        other = act.clone()
        other[change] *= -1
        torch.manual_seed(1)
        agent.vae.zero_grad()
        agent.vae_loss(obs, other).backward()
        grads.append(agent.vae.decoder[-1].weight.grad.clone())
    assert not grads[0].equal(grads[1]) and not grads[0].equal(grads[2])


def test_targets_follow_slowly(agent):
    before = [p.clone() for p in [*agent.target_qf.parameters(), *agent.target_perturb.parameters()]]
    agent.update(*batch())
    online = [*agent.qf.parameters(), *agent.perturb.parameters()]
    for old, new, target in zip(before, online, [*agent.target_qf.parameters(), *agent.target_perturb.parameters()], strict=True):
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


def test_bfloat16_is_close_update_after_update(agent):
    """With a large step size, so that a stale bfloat16 copy of a network's weights would show."""
    full, half = (romi_bcq.BCQ(4, 2, replace(ARGS, bf16=bf16, lr=0.01, tau=0.5), CPU) for bf16 in (False, True))
    half.load_state_dict(full.state_dict())
    rows = batch(64)
    for _ in range(5):
        out = []
        for a in (full, half):
            torch.manual_seed(1)
            out.append(torch.stack(list(a.update(*rows).values())))
        torch.testing.assert_close(*out, rtol=0.05, atol=0.05)
        assert (out[0] != out[1]).any() and out[1].dtype == torch.float32
    half.load_state_dict(full.state_dict())
    obs, act = rows[:2]
    with half.autocast():
        q = half.qf(obs, act)
    assert q.dtype == torch.float32 and (q != q.bfloat16()).any()  # the last layer is not rounded
    x = torch.tensor([[9.0, 9.0], [9.01, 9.01]])  # a centimetre apart, at the goal of the large maze: one point in bfloat16
    net = romi_bcq.mlp(2, 8, 8, 1)
    with half.autocast():
        first, hidden, last = net[0](x), net[2](net[0](x)), net[4](x.repeat(1, 4))
    assert (first[0] != first[1]).all()  # nor is the first
    assert [y.dtype for y in (first, hidden, last)] == [torch.float32, torch.bfloat16, torch.float32]
    torch.testing.assert_close(q, full.qf(obs, act), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("m", [romi_bcq, fomi_bcq])
def test_update_trains_the_generator_on_real_and_imagined_rows(m):
    agent, seen, rows = m.BCQ(4, 2, ARGS, CPU), [], batch(10)
    plain = agent.vae_loss
    agent.vae_loss = lambda obs, act: seen.append((obs, act)) or plain(obs, act)
    agent.update(*rows)
    assert len(seen) == 1 and seen[0][0].equal(rows[0]) and seen[0][1].equal(rows[1])


@pytest.mark.parametrize("m", [romi_bcq, fomi_bcq])
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
    budgets = dict(total_updates=1_000_000, model_buffer_size=4_000_000, rollout_policy_updates=500_000, batch_size=100)
    model = dict(ensemble_size=7, num_elites=5, dynamics_hidden=200, dynamics_batch_size=256, dynamics_lr=1e-3, dynamics_max_epochs=None)
    bcq = dict(gamma=0.99, tau=0.005, lr=1e-3, lmbda=0.75, phi=0.05, bcq_samples=10, eval_samples=100, hidden=(400, 300), vae_hidden=750)
    vae = dict(kl_weight=0.5, latent_clip=0.5, clip_rewards=False)
    for name, value in (budgets | model | bcq | vae).items():
        assert getattr(m.Args(), name) == value, name


# --- imagination ---


class Log:
    def __init__(self):
        self.state, self.logged, self.drawn = {}, {}, {}

    def log(self, update, metrics):
        self.logged |= metrics

    def draw(self, name, trajectories):
        self.drawn[name] = trajectories

    def save(self, phase, step, **parts):
        self.state |= parts | {"phase": phase}


def imagined_data(m, task, data, monkeypatch, imagine, **changes):
    """imagined_data with an untrained model and an imagination of the test's own -> its log"""
    monkeypatch.setattr(m, "train_dynamics", lambda *_: None)
    monkeypatch.setattr(m, "imagine", imagine)
    run, args = Log(), replace(m.Args(), dynamics_hidden=8, vae_hidden=8, rbc_hidden=8, rollout_policy_updates=3, **changes)
    m.imagined_data(parse_task(task), data, replace(args, horizon=args.horizon or 3), CPU, run, {}, None)
    return run


@pytest.mark.parametrize("m", [romi_bcq, fomi_bcq])
@pytest.mark.parametrize("policy", ["cvae", "rbc", "uniform"])
@pytest.mark.parametrize("priority", [True, False])
def test_rollout_policy_and_start_states_are_those_asked_for(m, policy, priority, monkeypatch):
    n, trajectory = 200, torch.arange(200) // 100  # the first trajectory earns nothing, the second something
    obs, act = torch.randn(n, 2), 2 * torch.rand(n, 2) - 1
    data = Dataset(obs, act, trajectory.float(), obs + 0.1, torch.zeros(n), torch.ones(n, dtype=torch.bool), trajectory)
    seen, taught = {}, []

    def imagine(starts, dynamics, rollout_policy, terminates, sampler, reward_range, args):
        seen.update(starts=starts, policy=type(rollout_policy), rows=sampler(4000), range=reward_range)
        return torch.zeros(10, 8), {}

    plain = m.train_rollout_policy
    monkeypatch.setattr(m, "train_rollout_policy", lambda p, cond, act, *rest: taught.append((cond, act)) or plain(p, cond, act, *rest))
    imagined_data(m, "halfcheetah-medium", data, monkeypatch, imagine, rollout_policy=policy, priority_rollout=priority)
    assert seen["policy"] is {"cvae": m.ConditionalVAE, "rbc": m.BehaviourCloning, "uniform": m.UniformPolicy}[policy]
    assert seen["starts"].equal(obs) and seen["range"] == (0, 1)
    assert (seen["rows"] >= 100).float().mean() == pytest.approx(1.0 if priority else 0.5, abs=0.0 if priority else 0.05)
    assert len(taught) == (policy != "uniform")
    for cond, a in taught:  # conditioned on the state that an imagined step is given
        assert a.equal(act) and cond.equal(data.next_obs if m is romi_bcq else obs)


@pytest.mark.parametrize("m", [romi_bcq, fomi_bcq])
def test_what_a_maze_run_logs_and_draws_of_its_imagination_runs_forward_in_time(m, monkeypatch):
    from maze2d_env import Maze2d

    h, n, env, rng = 3, 20, Maze2d("umaze"), torch.Generator().manual_seed(0)
    obs, act, next_obs = torch.zeros(n, h, 4), 2 * torch.rand(n, h, 2, generator=rng) - 1, torch.zeros(n, h, 4)
    for c in range(n):
        state = env.reset(seed=c)[0]
        for t in range(h):
            obs[c, t] = torch.as_tensor(state)
            state = env.step(act[c, t].numpy())[0]
            next_obs[c, t] = torch.as_tensor(state)
    rows = torch.stack([m.pack(*(x[:, t] for x in (obs, act, torch.zeros(n, h), next_obs, torch.zeros(n, h)))) for t in range(h)])
    rows = rows.flip(0) if m is romi_bcq else rows  # in the order of imagination
    known = torch.ones(n, dtype=torch.bool)
    data = Dataset(obs[:, 0], act[:, 0], torch.zeros(n), next_obs[:, 0], torch.zeros(n), known, torch.arange(n))
    changes = dict(rollout_policy="uniform", priority_rollout=False, horizon=h, model_buffer_size=h * n)
    run = imagined_data(m, "maze2d-umaze", data, monkeypatch, lambda *_: (rows.flatten(0, 1), {}), **changes)
    assert run.logged["model/replay_error_1"] < 1e-6 and run.logged["model/replay_error_3"] < 1e-6
    for c, trajectory in enumerate(run.drawn["imagination"]):
        assert (torch.as_tensor(trajectory) == torch.cat([obs[c], next_obs[c, -1:]])).all()
    tiny = imagined_data(m, "maze2d-umaze", data, monkeypatch, lambda *_: (rows.flatten(0, 1)[:4], {}), **changes)
    assert not tiny.drawn  # not one whole chain: nothing to show, and no error


# --- direction of time ---


@pytest.mark.parametrize("m", [romi_bcq, fomi_bcq])
def test_chains_touch_the_data_at_their_end_or_at_their_begin(m, monkeypatch):
    """ROMI's chains lead to states of the data, FOMI's away from them; the stored rows of both run forward in time."""
    obs, act = torch.randn(2000, 2), 2 * torch.rand(2000, 2) - 1
    row, real = torch.arange(2000), torch.ones(2000, dtype=torch.bool)
    data = Dataset(obs, act, obs[:, 0].clone(), obs + 0.1 * act, torch.zeros(2000), real, row)

    class Run:
        state: dict = {}

        def log(self, update, metrics):
            pass

        def save(self, phase, step, **parts):
            self.state = self.state | parts | {"phase": phase}

    args = replace(m.Args(), **{k: getattr(ARGS, k) for k in ("dynamics_hidden", "horizon", "rollout_policy", "rollout_batch_size")})
    args = replace(args, priority_rollout=False, dynamics_max_epochs=40, model_buffer_size=600)
    rows = m.imagined_data(parse_task("halfcheetah-medium"), data, args, CPU, Run(), {}, None)
    s, a, _, s2, terminated = (x.view(2, 3, 100, -1) for x in m.unpack(rows, 2, 2))  # (calls, steps, chains, ...)
    assert (s + 0.1 * a - s2).abs().mean() < 0.03 and terminated.sum() == 0
    in_data = {tuple(x) for x in obs.tolist()}
    reverse = m is romi_bcq
    touching, loose = (s2, s) if reverse else (s, s2)
    assert all(tuple(x) in in_data for x in touching[:, 0].flatten(0, 1).tolist())
    assert not any(tuple(x) in in_data for x in loose.flatten(0, 2).tolist())
    for i in (1, 2):
        assert (s2[:, i].equal(s[:, i - 1])) if reverse else s[:, i].equal(s2[:, i - 1])


@pytest.mark.parametrize("m, ended", [(romi_bcq, "given"), (fomi_bcq, "imagined")])
def test_termination_is_about_the_later_state(m, ended):
    args = replace(m.Args(), horizon=1, model_buffer_size=50, rollout_batch_size=50)
    dynamics, seen = m.Dynamics(2, 2, args), []

    def terminates(obs, act, next_obs):
        seen.append(next_obs)
        return torch.zeros(len(obs), dtype=torch.bool)

    starts = torch.full((5, 2), 7.0)
    m.imagine(starts, dynamics, m.UniformPolicy(2, 2, args), terminates, m.Sampler(5, None, CPU), (0.0, 1.0), args)
    assert (seen[0] == 7).all().item() == (ended == "given")


def test_a_small_buffer_still_holds_whole_chains():
    """Fewer rows than horizon x rollout batch: fewer chains, not shorter ones."""
    args = replace(romi_bcq.Args(), horizon=5, model_buffer_size=50, rollout_batch_size=1000)
    dynamics, starts = romi_bcq.Dynamics(2, 2, args), torch.randn(100, 2)
    terminates = romi_bcq.termination_fn(parse_task("halfcheetah-medium"), None)
    policy = romi_bcq.UniformPolicy(2, 2, args)
    rows, _ = romi_bcq.imagine(starts, dynamics, policy, terminates, romi_bcq.Sampler(100, None, CPU), (0.0, 1.0), args)
    obs, _, _, next_obs, _ = (x.view(5, 10, -1) for x in romi_bcq.unpack(rows, 2, 2))
    assert all(next_obs[i].equal(obs[i - 1]) for i in range(1, 5))
