"""Facts about ROMI-CQL: targets, penalties and chains against numbers worked by hand."""

import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import romi_cql as m
import torch
from torch.distributions import Independent, Normal, TransformedDistribution
from torch.distributions.kl import kl_divergence
from torch.distributions.transforms import TanhTransform

from utils import Dataset, UserError, parse_task

CPU = torch.device("cpu")
ARGS = m.Args(
    exp_name="test", dynamics_hidden=32, hidden=(32, 32, 32), vae_hidden=32, rbc_hidden=32, cql_samples=3, batch_size=20, model_ratio=0.1,
    horizon=3, rollout_policy="uniform", model_buffer_size=1000, rollout_batch_size=100,
)  # fmt: skip


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def toy(n=2000):
    """s' = s + 0.1 a in two dimensions, reward s_0: (obs, act, rew, next_obs)"""
    obs, act = torch.randn(n, 2), 2 * torch.rand(n, 2) - 1
    return obs, act, obs[:, 0].clone(), obs + 0.1 * act


class Log:
    """Stands in for a Run where only its log is needed."""

    def __init__(self):
        self.state, self.rows = {}, []

    def log(self, update, metrics):
        self.rows.append(metrics)

    def save(self, phase, step, **parts):
        pass


# --- squashed Gaussian ---


def test_squash_is_the_tanh_normal_of_torch_distributions():
    mean, log_std, noise = torch.randn(3, 50, 2).double()
    act, log_prob = m.squash(mean, log_std, noise)
    reference = Independent(TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform(cache_size=1)), 1)
    expected = reference.log_prob(act.clamp(-1 + 1e-9, 1 - 1e-9))
    inside = act.abs().amax(-1) < 0.999
    torch.testing.assert_close(log_prob[inside], expected[inside], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(m.squashed_log_prob(mean, log_std, act)[inside], log_prob[inside], rtol=1e-4, atol=1e-4)


def test_log_prob_of_boundary_actions_is_finite():
    log_prob = m.squashed_log_prob(torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([[1.0, -1.0, 1.0], [0.0, 0.0, 0.0]]))
    assert log_prob.isfinite().all()
    assert log_prob[1].item() == pytest.approx(-1.5 * math.log(2 * math.pi))


# --- dynamics ensemble ---


def test_dynamics_loss_is_the_gaussian_likelihood():
    dynamics = m.Dynamics(2, 2, ARGS)
    x, y = torch.randn(7, 5, 4), torch.randn(7, 5, 3)
    mean, logvar = dynamics(x)
    nll = -Normal(mean, (0.5 * logvar).exp()).log_prob(y).mean((1, 2))
    expected = (2 * nll - math.log(2 * math.pi)).sum() + 0.01 * 3 * (0.5 + 10)
    torch.testing.assert_close(dynamics.loss(x, y), expected)


def test_log_variance_bounds_are_soft_and_keep_a_gradient():
    dynamics = m.Dynamics(2, 2, ARGS)
    dynamics(torch.randn(7, 5, 4))
    raw = torch.linspace(-15, 15, 31, requires_grad=True)
    bounded = 0.5 - torch.nn.functional.softplus(0.5 - raw)
    bounded = -10 + torch.nn.functional.softplus(bounded + 10)
    # the network's own bounds, with the last layer's output put in by hand
    with torch.no_grad():
        dynamics.weight[-1].zero_()
        dynamics.bias[-1].copy_(torch.cat([torch.zeros(3), raw[[0, 15, 30]]]).expand(7, 1, 6))
    _, logvar = dynamics(torch.zeros(7, 1, 4))
    torch.testing.assert_close(logvar[0, 0], bounded.detach()[[0, 15, 30]])
    assert (logvar >= -10).all() and (logvar <= 0.5 + math.log1p(math.exp(-10.5)) + 1e-6).all()
    bounded.sum().backward()
    assert (raw.grad > 0).all()


def test_bounds_are_pulled_together_by_one_hundredth():
    dynamics = m.Dynamics(2, 2, ARGS)
    (0.01 * (dynamics.max_logvar.sum() - dynamics.min_logvar.sum())).backward()
    regulariser = dynamics.max_logvar.grad.clone(), dynamics.min_logvar.grad.clone()
    dynamics.zero_grad()
    mean, logvar = dynamics(x := torch.randn(7, 4, 4))
    ((mean - 1).square() * (-logvar).exp() + logvar).mean((1, 2)).sum().backward()
    without = dynamics.max_logvar.grad.clone(), dynamics.min_logvar.grad.clone()
    dynamics.zero_grad()
    dynamics.loss(x, torch.ones(7, 4, 3)).backward()
    for full, part, pull, sign in zip((dynamics.max_logvar.grad, dynamics.min_logvar.grad), without, regulariser, (1, -1), strict=True):
        torch.testing.assert_close(full - part, pull, atol=1e-5, rtol=1e-3)
        torch.testing.assert_close(pull, torch.full((3,), sign * 0.01))


def test_members_do_not_mix():
    dynamics = m.Dynamics(2, 2, ARGS)
    x = torch.randn(7, 5, 4)
    mean, logvar = dynamics(x)
    for e in range(7):
        alone = dynamics(x[e : e + 1], slice(e, e + 1))
        torch.testing.assert_close(alone[0][0], mean[e])
        torch.testing.assert_close(alone[1][0], logvar[e])
    mean[2].square().sum().backward()
    for w in dynamics.weight:
        assert [e for e in range(7) if w.grad[e].abs().sum() > 0] == [2]


def test_bfloat16_model_is_close_and_its_outer_layers_are_not_rounded():
    full, half = m.Dynamics(2, 2, ARGS), m.Dynamics(2, 2, replace(ARGS, dynamics_bf16=True))
    half.load_state_dict(full.state_dict())
    x, y = torch.randn(7, 500, 4), torch.randn(7, 500, 3)
    grads = []
    for dynamics in (full, half):
        dynamics.loss(x, y).backward()
        grads.append([w.grad for w in dynamics.weight])
    for i, (a, b) in enumerate(zip(*grads, strict=True)):
        assert b.dtype == torch.float32 and 0 < (a - b).norm() < 0.05 * a.norm(), i
    (mean, logvar), (rough, rough_logvar) = full(x), half(x)
    assert rough.dtype == torch.float32 and (rough != rough.bfloat16()).any()
    assert 0 < (mean - rough).norm() < 0.02 * mean.norm() and (logvar - rough_logvar).abs().max() < 0.05
    near = torch.tensor([9.0, 9.001]).bfloat16()
    assert near[0] == near[1]  # states a millimetre apart are one number in bfloat16, and two for this model
    apart = half(torch.stack([torch.full((7, 4), 9.0), torch.full((7, 4), 9.001)], 1))[0]
    assert (apart[:, 0] != apart[:, 1]).any()


def test_weight_decay_is_the_gradient_of_the_references_loss_term():
    dynamics = m.Dynamics(2, 2, replace(ARGS, dynamics_weight_decay=(0.1, 0.2, 0.3, 0.4, 0.5)))
    opt = dynamics.optimizer()
    assert [g["weight_decay"] for g in opt.param_groups] == [0.1, 0.2, 0.3, 0.4, 0.5, 0]
    assert all(g["params"][0] is w for g, w in zip(opt.param_groups, dynamics.weight, strict=False))
    assert isinstance(opt, torch.optim.Adam) and not isinstance(opt, torch.optim.AdamW)
    assert not opt.param_groups[0]["decoupled_weight_decay"]


def test_sampled_rows_come_from_elites_only():
    dynamics = m.Dynamics(2, 2, ARGS)
    with torch.no_grad():  # member e predicts the constant e, almost without noise
        dynamics.weight[-1].zero_()
        for e in range(7):
            dynamics.bias[-1][e, 0] = torch.tensor([e, e, e, -30.0, -30.0, -30.0])
        dynamics.min_logvar.fill_(-30)
    dynamics.elites.copy_(torch.tensor([1, 2, 3, 5, 6]))
    obs, rew = dynamics.sample(torch.zeros(3000, 2), torch.zeros(3000, 2))
    who = rew.round().long()
    assert set(who.tolist()) == {1, 2, 3, 5, 6}
    assert (who.bincount(minlength=7)[[1, 2, 3, 5, 6]] > 500).all()  # 600 each, about
    torch.testing.assert_close(obs, rew[:, None].expand(-1, 2), atol=1e-4, rtol=0)  # state and reward from the same member


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    obs, act, rew, next_obs = toy()
    dynamics, log = m.Dynamics(2, 2, ARGS), Log()
    m.train_dynamics(dynamics, next_obs, act, rew, obs, replace(ARGS, dynamics_max_epochs=40), log)
    return dynamics, log


def test_learnt_reverse_model_undoes_the_forward_step(trained):
    dynamics, _ = trained
    obs, act, rew, next_obs = toy(500)
    before, reward = dynamics.sample(next_obs, act)
    assert (before - obs).abs().mean() < 0.02 < (next_obs - obs).abs().mean()
    torch.testing.assert_close((next_obs - before - 0.1 * act).mean(0), torch.zeros(2), atol=0.01, rtol=0)
    assert (reward - rew).abs().mean() < 0.05


def test_errors_of_the_reverse_model_add_up_along_a_chain(trained):
    dynamics, _ = trained
    state, cond, errors = torch.randn(500, 2), None, []
    for _ in range(8):
        act = 2 * torch.rand(500, 2) - 1
        cond = dynamics.sample(state if cond is None else cond, act)[0]
        state = state - 0.1 * act
        errors.append((cond - state).norm(dim=1).mean().item())
    assert errors == sorted(errors) and errors[-1] > 2 * errors[0]


def test_noise_of_the_system_is_learnt_as_variance():
    obs, act, rew, next_obs = toy(4000)
    noisy = obs + 0.1 * torch.randn_like(obs)
    dynamics, log = m.Dynamics(2, 2, ARGS), Log()
    m.train_dynamics(dynamics, next_obs, act, rew, noisy, replace(ARGS, dynamics_max_epochs=30), log)
    assert log.rows[-1]["model/elite_mse"] == pytest.approx(2 / 3 * 0.01, rel=0.2)  # two noisy dimensions, an exact reward
    _, logvar = dynamics(dynamics.inputs(next_obs, act).expand(7, -1, -1))
    assert logvar[dynamics.elites, :, 1:].exp().mean().item() == pytest.approx(0.01, rel=0.2)


def test_elites_are_the_members_with_the_lowest_holdout_error():
    obs, act, rew, next_obs = toy(300)
    args = replace(ARGS, dynamics_max_epochs=1, dynamics_lr=1e-30)  # weights stay where they are put
    dynamics = m.Dynamics(2, 2, args)
    with torch.no_grad():
        dynamics.weight[-1].zero_()
        dynamics.bias[-1][:, 0, :3] = torch.tensor([7.0, 1.0, 6.0, 2.0, 5.0, 3.0, 4.0])[:, None]
    m.train_dynamics(dynamics, next_obs, act, rew, obs, args, Log())
    assert dynamics.elites.tolist() == [1, 3, 5, 6, 4]


def test_every_member_keeps_its_own_best_epoch():
    (obs, act, rew, next_obs), args = toy(300), replace(ARGS, dynamics_max_epochs=8, dynamics_patience=99, dynamics_lr=3e-2)
    dynamics, seen = m.Dynamics(2, 2, args), []

    class Watch(Log):
        def save(self, phase, step, dynamics, dynamics_training):
            seen.append((dynamics_training["best"].clone(), [p.clone() for p in dynamics_training["snapshot"]]))

    m.train_dynamics(dynamics, next_obs, act, rew, obs, args, Watch())
    layers = [*dynamics.weight, *dynamics.bias]
    bests = torch.stack([best for best, _ in seen])  # (epochs, E)
    last_gain = [max(i for i in range(8) if i == 0 or bests[i, e] < bests[i - 1, e]) for e in range(7)]
    assert len(set(last_gain)) > 1
    for e, epoch in enumerate(last_gain):
        assert all(torch.equal(p[e], kept[e]) for p, kept in zip(layers, seen[epoch][1], strict=True))


def test_training_stops_on_the_sixth_stale_epoch_and_keeps_the_best_weights(monkeypatch):
    obs, act, rew, next_obs = toy(400)
    dynamics, log = m.Dynamics(2, 2, replace(ARGS, dynamics_lr=1e-12)), Log()
    m.train_dynamics(dynamics, next_obs, act, rew, obs, replace(ARGS, dynamics_lr=1e-12), log)
    epochs = [r["model/epoch"] for r in log.rows if "model/epoch" in r]
    assert epochs == list(range(1, 8))  # the first epoch improves on infinity, then six do not


# --- reverse policies ---


def test_vae_loss_is_reconstruction_plus_weighted_mean_kl(monkeypatch):
    vae = m.ConditionalVAE(2, 3, ARGS)
    next_obs, act = torch.randn(5, 2), torch.rand(5, 3)
    noise = torch.randn(5, 6)
    monkeypatch.setattr(torch, "randn_like", lambda x: noise)
    mean, log_std = vae.encoder(torch.cat([next_obs, act], -1)).chunk(2, -1)
    kl = kl_divergence(Normal(mean, log_std.exp()), Normal(0, 1)).mean()
    recon = (vae.decode(next_obs, mean + log_std.exp() * noise) - act).square().mean()
    torch.testing.assert_close(vae.loss(next_obs, act), recon + 0.5 * kl)


def test_vae_samples_use_clipped_latents_and_depend_on_the_next_state():
    vae, seen = m.ConditionalVAE(2, 3, ARGS), []
    decode = vae.decode
    vae.decode = lambda next_obs, latent: (seen.append(latent), decode(next_obs, latent))[1]
    act = vae.sample(5 * torch.randn(200, 2))
    assert seen[0].abs().max() == 0.5 and (seen[0].abs() < 0.5).any()
    assert act.abs().max() <= 1 and act.std(0).min() > 0


def test_vae_learns_to_reconstruct():
    vae = m.ConditionalVAE(1, 1, replace(ARGS, kl_weight=0.0))
    next_obs, act = torch.tensor([[0.0], [1.0]]), torch.tensor([[-0.5], [0.5]])
    opt = torch.optim.Adam(vae.parameters(), 1e-2)
    for _ in range(300):
        opt.zero_grad()
        vae.loss(next_obs, act).backward()
        opt.step()
    mean, _ = vae.encoder(torch.cat([next_obs, act], -1)).chunk(2, -1)
    torch.testing.assert_close(vae.decode(next_obs, mean), act, atol=0.1, rtol=0)


def test_rbc_is_maximum_likelihood():
    rbc = m.BehaviourCloning(2, 3, ARGS)
    next_obs, act = torch.randn(5, 2), 0.9 * torch.rand(5, 3)
    mean, log_std = rbc(next_obs)
    reference = Independent(TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform()), 1)
    torch.testing.assert_close(rbc.loss(next_obs, act), -reference.log_prob(act).mean(), rtol=1e-4, atol=1e-4)
    # on one state the likelihood is greatest at the empirical spread of atanh(a): its gradient vanishes there
    u = act.atanh()
    log_std = u.std(0, unbiased=False).log().requires_grad_()
    (-m.squashed_log_prob(u.mean(0), log_std, act).mean()).backward()
    torch.testing.assert_close(log_std.grad, torch.zeros(3), atol=1e-3, rtol=0)


def test_uniform_policy_is_uniform():
    act = m.UniformPolicy(2, 3, ARGS).sample(torch.zeros(100_000, 2))
    assert act.abs().max() <= 1
    torch.testing.assert_close(act.mean(0), torch.zeros(3), atol=0.01, rtol=0)
    torch.testing.assert_close(act.var(0), torch.full((3,), 1 / 3), atol=0.01, rtol=0)


# --- sampling ---


def test_priority_weights_and_frequencies():
    weights = m.priority_weights(torch.tensor([0.0, 5.0, 10.0], dtype=torch.float64))
    assert weights.tolist() == [0, 0.5, 1]
    assert m.priority_weights(torch.tensor([0.0, 0.5])).tolist() == [0, 0.5]  # a spread below 1 is not blown up
    counts = m.Sampler(3, weights, CPU)(30_000).bincount(minlength=3)
    assert counts[0] == 0 and abs(counts[2] / counts[1] - 2) < 0.1
    assert m.Sampler(3, torch.tensor([1.0, 0.0, 0.0]), CPU)(1000).unique().tolist() == [0]


def test_equal_returns_are_sampled_uniformly():
    weights = m.priority_weights(torch.full((4,), 3.0))
    assert m.Sampler(4, weights, CPU)(4000).bincount(minlength=4).min() > 800


# --- termination and imagination ---


def task_data(task, n=10):
    z = torch.zeros(n)
    return Dataset(torch.zeros(n, 29), torch.zeros(n, 8), z, torch.zeros(n, 29), z, z == 0, z.long())


def test_termination_rules():
    def end(task, next_obs):
        data = task_data(task)
        data.terminated[:2], data.next_obs[0, :2], data.next_obs[1, :2] = 1, torch.tensor([3.5, 8.0]), torch.tensor([4.5, 8.0])
        fn = m.termination_fn(parse_task(task), data)
        obs = torch.zeros_like(next_obs)
        return fn(obs, torch.zeros(len(obs), 1), next_obs).tolist()

    def rows(width, *changes):
        out = torch.zeros(len(changes), width)
        for row, change in zip(out, changes, strict=True):
            for i, v in change.items():
                row[i] = v
        return out

    ok = {0: 1.25}
    fallen = [ok, {0: 0.7}, {**ok, 1: 0.2}, {**ok, 1: -0.25}, {**ok, 7: 101.0}, {**ok, 7: -101.0}, {**ok, 5: math.nan}]
    assert end("hopper-medium", rows(11, *fallen)) == [False] + 6 * [True]
    assert end("walker2d-medium", rows(17, ok, {0: 0.8}, {0: 2.0}, {**ok, 1: 1.0}, {**ok, 1: -1.0})) == [False] + 4 * [True]
    assert end("ant-medium", rows(27, {0: 0.2}, {0: 1.0}, {0: 0.19}, {0: 1.01}, {0: 0.5, 3: math.inf})) == 2 * [False] + 3 * [True]
    assert end("halfcheetah-medium", rows(17, {0: -9.0})) == [False]
    assert end("maze2d-umaze", rows(4, {0: -9.0})) == [False]
    # antmaze: the goal is the middle of the rewarded positions, (4, 8) here
    assert end("antmaze-umaze", rows(29, {0: 4.0, 1: 8.4}, {0: 4.0, 1: 8.6})) == [True, False]


@pytest.mark.parametrize("robot", ["Hopper-v4", "Walker2d-v4", "Ant-v4"])
def test_termination_rules_are_gymnasiums(robot):
    from utils import make_env

    name = robot.split("-")[0].lower()
    env, rng, ended = make_env(name), np.random.default_rng(0), []
    fn = m.termination_fn(parse_task(f"{name}-medium"), task_data("x"))
    for episode in range(4):
        env.reset(seed=episode)
        for t in range(300):
            if t % 50 == 49:  # into states that random torques do not reach
                qpos = env.unwrapped.data.qpos.copy()
                qpos[2 if name == "ant" else 1] = rng.uniform(0, 2.2)
                env.unwrapped.set_state(qpos, env.unwrapped.data.qvel.copy())
            obs, _, terminated, _, _ = env.step(rng.uniform(-1, 1, env.action_space.shape).astype(np.float32))
            obs = torch.as_tensor(obs, dtype=torch.float32)[None]
            ended.append(terminated)
            assert fn(obs, None, obs).item() == terminated
            if terminated:
                env.reset(seed=100 + episode)
    assert 0 < sum(ended) < len(ended)


def imagine(dynamics, starts, terminates, **changes):
    args = replace(ARGS, **changes)
    policy = m.UniformPolicy(2, 2, args)
    return m.imagine(starts, dynamics, policy, terminates, m.Sampler(len(starts), None, CPU), (-1.0, 1.0), args)


def never(obs, act, next_obs):
    return torch.zeros(len(obs), dtype=torch.bool)


def test_chains_run_backwards_from_states_of_the_data(trained):
    starts = torch.randn(50, 2)
    buffer, _ = imagine(trained[0], starts, never, model_buffer_size=450, rollout_batch_size=50)
    obs, act, _, next_obs, terminated = (x.view(3, 3, 50, -1) for x in m.unpack(buffer, 2, 2))  # (calls, steps, chains, ...)
    for call in range(3):
        assert all((starts == row).all(-1).any() for row in next_obs[call, 0])  # the last state of a chain is in the data
        assert torch.equal(next_obs[call, 1], obs[call, 0]) and torch.equal(next_obs[call, 2], obs[call, 1])
    assert (obs + 0.1 * act - next_obs).abs().mean() < 0.03 < (obs - 0.1 * act - next_obs).abs().mean()  # rows run forward in time
    assert act.abs().max() <= 1 and terminated.sum() == 0


def test_identity_model_stays_at_the_data():
    dynamics = m.Dynamics(2, 2, ARGS)
    with torch.no_grad():
        dynamics.weight[-1].zero_()
        dynamics.bias[-1][:, :, 3:] = -60
        dynamics.min_logvar.fill_(-60)
    starts = torch.randn(50, 2)
    buffer, _ = imagine(dynamics, starts, never, model_buffer_size=300)
    obs, _, rew, next_obs, _ = m.unpack(buffer, 2, 2)
    torch.testing.assert_close(obs, next_obs, atol=1e-6, rtol=0)
    torch.testing.assert_close(rew, torch.zeros(300), atol=1e-6, rtol=0)


def test_a_chain_that_ended_stays_ended_and_the_buffer_is_exactly_full(trained):
    starts = torch.randn(100, 2)

    def given_end_on_the_left(obs, act, next_obs):
        return next_obs[:, 0] < 0

    buffer, stats = imagine(trained[0], starts, given_end_on_the_left, model_buffer_size=777)
    obs, _, _, next_obs, terminated = m.unpack(buffer, 2, 2)
    assert len(buffer) == 777 and buffer.isfinite().all()
    assert torch.equal(terminated > 0, next_obs[:, 0] < 0)  # judged by the given end, whatever was imagined before it
    assert 0 < terminated.mean() < 1
    stopped = obs[terminated > 0]
    assert not any((next_obs == row).all(-1).any() for row in stopped)  # nothing was imagined before a terminal row
    assert stats["model/chains_cut_at_step_1"] == pytest.approx((starts[:, 0] < 0).float().mean().item(), abs=0.15)


def test_clipped_rewards(trained):
    buffer, _ = imagine(trained[0], 5 * torch.randn(50, 2), never, clip_rewards=True)
    assert m.unpack(buffer, 2, 2)[2].abs().max() == 1


def test_rows_without_a_successor_teach_the_models_nothing(monkeypatch, tmp_path):
    obs, act, rew, next_obs = toy(100)
    has_next = torch.arange(100) % 10 != 9
    next_obs[~has_next] = 1e6
    data = Dataset(obs, act, rew, next_obs, (~has_next).float(), has_next, torch.arange(100) // 10)
    seen = {}

    def train(dynamics, cond, act, rew, pred, args, run):
        seen["dynamics"] = cond

    class Stored(Log):
        def save(self, phase, step, **parts):
            self.state |= parts | {"phase": phase}

    monkeypatch.setattr(m, "train_dynamics", train)
    monkeypatch.setattr(m, "train_rollout_policy", lambda p, cond, act, args, run: seen.update(policy=cond))
    args = replace(ARGS, rollout_policy="cvae", priority_rollout=False)
    m.imagined_data(parse_task("halfcheetah-medium"), data, args, CPU, Stored(), {}, None)
    for x in seen.values():
        assert len(x) == 90 and x.max() < 1e6


# --- conservative Q-learning ---


def test_constant_q_gives_the_volume_of_the_action_box():
    c, N, A = 1.7, 10, 3
    penalty = m.conservative_penalty(torch.zeros(2, 4), torch.full((2, 4, N), c), torch.full((4, N), A * math.log(0.5)))
    torch.testing.assert_close(penalty, torch.full((2, 4), c + A * math.log(2) + math.log(N)))


def test_log_sum_exp_is_the_integral_over_actions():
    N = 100_000
    act = 2 * torch.rand(1, 1, N).double() - 1
    q = (-2 * (act - 0.3) ** 2).expand(2, 1, N)
    penalty = m.conservative_penalty(torch.zeros(2, 1).double(), q, torch.full((1, N), math.log(0.5)).double()) - math.log(N)
    grid = torch.linspace(-1, 1, 100_001).double()
    assert penalty[0, 0].item() == pytest.approx(torch.trapezoid((-2 * (grid - 0.3) ** 2).exp(), grid).log().item(), abs=0.01)


def test_penalty_pushes_down_sampled_actions_and_up_the_rows_own():
    q_data, q_sampled = torch.zeros(2, 4, requires_grad=True), torch.randn(2, 4, 9, requires_grad=True)
    m.conservative_penalty(q_data, q_sampled, torch.zeros(4, 9)).sum().backward()
    assert (q_data.grad == -1).all() and (q_sampled.grad > 0).all()
    torch.testing.assert_close(q_sampled.grad.sum(-1), torch.ones(2, 4))  # a softmax over all 3N, not over 3


def test_penalty_refuses_another_number_of_actions():
    with pytest.raises(AssertionError):
        m.conservative_penalty(torch.zeros(2, 4), torch.zeros(2, 12, 3), torch.zeros(4, 9))


def batch(n=3, terminated=0.0):
    return torch.randn(n, 4), 1.8 * torch.rand(n, 2) - 0.9, torch.randn(n), torch.randn(n, 4), torch.full((n,), terminated)


@pytest.mark.parametrize("n", [1, 3])
def test_critic_loss_by_hand(n):
    """Same random numbers, plain loops: shapes, targets, the three sources, their densities, and where they are evaluated."""
    agent = m.CQL(4, 2, replace(ARGS, gamma=0.9), CPU)
    for p in agent.target_qf.parameters():
        p.add_(0.1)  # a target network of its own
    obs, act, rew, next_obs, terminated = batch(n)
    terminated[0] = 1
    torch.manual_seed(3)
    td, penalty, _ = agent.critic_loss(obs, act, rew, next_obs, terminated)
    torch.manual_seed(3)
    noise, uniform = torch.randn(2 * n, 4, 2), 2 * torch.rand(n, 3, 2) - 1
    td_by_hand = penalty_by_hand = 0.0
    for i in range(n):

        def pi(state, z):
            mean, log_std = agent.policy(state[None])
            u = mean[0] + log_std[0].exp() * z
            density = Independent(Normal(mean[0], log_std[0].exp()), 1).log_prob(u) - (1 - u.tanh() ** 2).log().sum()
            return u.tanh(), density

        next_act, _ = pi(next_obs[i], noise[n + i, 3])
        target = rew[i] + 0.9 * (1 - terminated[i]) * agent.target_qf(next_obs[i][None], next_act[None]).min()
        q = agent.qf(obs[i][None], act[i][None])[:, 0]
        td_by_hand += (q - target).square().sum() / n
        terms = [(uniform[i, j], torch.tensor(2 * math.log(0.5))) for j in range(3)]
        terms += [pi(obs[i], noise[i, j]) for j in range(3)] + [pi(next_obs[i], noise[n + i, j]) for j in range(3)]
        values = torch.stack([agent.qf(obs[i][None], a[None])[:, 0] - density for a, density in terms], -1)
        penalty_by_hand += (values.exp().sum(-1).log() - q).sum() / n
    torch.testing.assert_close(td, td_by_hand, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(penalty, penalty_by_hand, rtol=1e-4, atol=1e-4)


def test_a_terminal_row_does_not_bootstrap():
    agent = m.CQL(4, 2, ARGS, CPU)
    obs, act, rew, next_obs, _ = batch()
    q = agent.qf(obs, act)
    td, _, metrics = agent.critic_loss(obs, act, rew, next_obs, torch.ones(3))
    torch.testing.assert_close(td, (q - rew).square().mean(1).sum())
    torch.testing.assert_close(metrics["q/target"], rew.mean())


def test_warm_up_clones_and_afterwards_follows_q():
    agent = m.CQL(4, 2, ARGS, CPU)
    obs, act, *_ = batch(5)
    alpha = torch.tensor(0.3)
    mean, log_std = agent.policy(obs)
    for warm_up in (True, False):
        torch.manual_seed(1)
        loss, _ = agent.policy_loss(obs, act, alpha, warm_up)
        torch.manual_seed(1)
        new_act, log_prob = m.squash(mean, log_std, torch.randn_like(mean))
        gain = m.squashed_log_prob(mean, log_std, act) if warm_up else agent.qf(obs, new_act).amin(0)
        torch.testing.assert_close(loss, (0.3 * log_prob - gain).mean())
    before = agent.policy_loss(obs, act, alpha, False)[0].item()
    torch.manual_seed(2)
    a = agent.policy_loss(obs, act, alpha, False)[0]
    torch.manual_seed(2)
    b = agent.policy_loss(obs, -act, alpha, False)[0]
    assert torch.equal(a, b) and math.isfinite(before)  # after the warm-up the rows' own actions play no part


def parameters(agent):
    groups = {k: getattr(agent, k).parameters() for k in ("policy", "qf", "target_qf")}
    groups |= {f"alpha_{k}": [v] for k, v in agent.alphas.items()}
    return {k: [p.detach().clone() for p in ps] for k, ps in groups.items()}


def moved(before, agent):
    after = parameters(agent)
    return {k for k in before if any(not torch.equal(a, b) for a, b in zip(before[k], after[k], strict=True))}


@pytest.mark.parametrize(
    "flags, warm_up, bc_only, expected",
    [
        ({}, False, False, {"policy", "qf", "target_qf", "alpha_sac"}),
        ({}, True, False, {"policy", "qf", "target_qf", "alpha_sac"}),  # the Q functions train in the warm-up too
        ({}, True, True, {"policy", "alpha_sac"}),
        ({"lagrange": True}, False, False, {"policy", "qf", "target_qf", "alpha_sac", "alpha_cql"}),
    ],
)
def test_every_optimizer_moves_its_own_parameters(flags, warm_up, bc_only, expected):
    agent = m.CQL(4, 2, replace(ARGS, **flags), CPU)
    before = parameters(agent)
    agent.update(*batch(), warm_up, bc_only)
    assert moved(before, agent) == expected


def test_policy_step_leaves_q_and_critic_step_leaves_the_policy():
    agent = m.CQL(4, 2, replace(ARGS, policy_lr=1e-30), CPU)
    before = parameters(agent)
    agent.update(*batch(), False, False)
    assert "policy" not in moved(before, agent)
    loss, _ = agent.policy_loss(*batch()[:2], torch.tensor(1.0), False)
    agent.qf.zero_grad()
    loss.backward(inputs=list(agent.policy.parameters()))
    assert all(p.grad is None for p in agent.qf.parameters())


def test_temperature_rises_when_entropy_is_below_its_target_and_target_networks_follow_slowly():
    for target, up in ((1e3, True), (-1e3, False)):
        agent = m.CQL(4, 2, replace(ARGS, target_entropy=target), CPU)
        before, q_before = agent.alphas["sac"].item(), parameters(agent)
        agent.update(*batch(), False, False)
        assert (agent.alphas["sac"].item() > before) == up
        for old, new, target_new in zip(q_before["target_qf"], agent.qf.parameters(), agent.target_qf.parameters(), strict=True):
            torch.testing.assert_close(target_new, old + 0.005 * (new.detach() - old))


def test_lagrange_raises_the_weight_while_the_penalty_exceeds_the_gap():
    for gap, up in ((-100.0, True), (100.0, False)):
        agent = m.CQL(4, 2, replace(ARGS, lagrange=True, lagrange_gap=gap), CPU)
        agent.update(*batch(), False, False)
        assert (agent.alphas["cql"].item() > math.log(5)) == up


def test_bfloat16_is_close_and_leaves_targets_alone():
    a, b = (m.CQL(4, 2, replace(ARGS, bf16=bf16), CPU) for bf16 in (False, True))
    b.load_state_dict(a.state_dict())
    rows, out = batch(64), []
    for agent in (a, b):
        torch.manual_seed(5)
        out.append(agent.critic_loss(*rows))
    assert torch.equal(out[0][0], out[1][0]) and torch.equal(out[0][2]["q/target"], out[1][2]["q/target"])
    torch.testing.assert_close(out[0][1], out[1][1], rtol=0.02, atol=0.02)


def test_compiled_losses_equal_eager_ones(monkeypatch):
    if not shutil.which("c++"):
        pytest.skip("torch.compile needs a C++ compiler")
    monkeypatch.setattr("torch._inductor.config.fallback_random", True)  # as main does
    a, b = (m.CQL(4, 2, replace(ARGS, compile=c), CPU) for c in (False, True))
    b.load_state_dict(a.state_dict())
    rows, out = batch(8), []
    for agent in (a, b):
        torch.manual_seed(5)
        out.append([agent.update(*rows, w, False) for w in (True, False, False)])
    for eager, compiled in zip(*out, strict=True):
        for k in eager:
            torch.testing.assert_close(eager[k], compiled[k], rtol=1e-3, atol=1e-4)


def test_state_dict_round_trip_goes_on_bit_for_bit():
    a, b = m.CQL(4, 2, ARGS, CPU), m.CQL(4, 2, ARGS, CPU)
    a.update(*batch(), False, False)
    b.load_state_dict(json_free_copy(a.state_dict()))
    rows = batch()
    for agent in (a, b):
        torch.manual_seed(9)
        agent.update(*rows, False, False)
    for k, v in parameters(a).items():
        assert all(torch.equal(x, y) for x, y in zip(v, parameters(b)[k], strict=True))


def json_free_copy(state):
    import io

    f = io.BytesIO()
    torch.save(state, f)
    f.seek(0)
    return torch.load(f, weights_only=True)


# --- settings ---


def test_the_task_decides_what_the_user_left_open():
    def settings(name, **kw):
        a = m.resolve(m.Args(env=name, **kw), parse_task(name))
        return a.horizon, a.model_ratio, a.rollout_policy, a.priority_rollout, a.priority_policy, a.exp_name

    assert settings("hopper-medium-replay") == (5, 0.1, "uniform", True, True, "romi_cql")
    assert settings("walker2d-expert") == (1, 0.1, "cvae", True, True, "romi_cql")
    assert settings("ant-medium")[:3] == (1, 0.1, "cvae")
    assert settings("antmaze-large-play")[:3] == (5, 0.1, "cvae")
    assert settings("maze2d-large-dense") == (5, 0.3, "uniform", False, False, "romi_cql")
    assert settings("hopper-medium", horizon=2, model_ratio=0.0, priority_policy=False) == (2, 0.0, "uniform", True, False, "cql")
    assert settings("hopper-medium", model_ratio=0.0, bc_warmup=10, total_updates=10)[-1] == "bc"


@pytest.mark.parametrize(
    "flags", [{"batch_size": 0}, {"gamma": 1.5}, {"qf_lr": -1.0}, {"tau": math.nan}, {"num_elites": 8}, {"model_ratio": 1e-4},
              {"total_updates": -5}, {"dynamics_weight_decay": (0.1,)}, {"model_ratio": 1.5}]
)  # fmt: skip
def test_settings_that_cannot_work_are_refused(flags):
    with pytest.raises(UserError):
        m.resolve(m.Args(**flags), parse_task("hopper-medium-replay"))
