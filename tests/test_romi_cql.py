"""Facts about ROMI-CQL: targets, penalties and chains against numbers worked by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
import romi_cql as m
import torch
from torch import nn
from torch.distributions import Independent, Normal, TransformedDistribution
from torch.distributions.kl import kl_divergence
from torch.distributions.transforms import TanhTransform

from utils import Dataset, UserError, make_env, parse_task, unpack

CPU = torch.device("cpu")
ARGS = m.Args(dynamics_hidden=32, hidden=(32, 32, 32), cql_samples=3, batch_size=20, model_ratio=0.1, horizon=3)
ARGS = replace(ARGS, rollout_policy="uniform", model_buffer_size=1000, rollout_batch_size=100)


@pytest.fixture(autouse=True)
def seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def toy(n=2000):
    """s' = s + 0.1 a in two dimensions, reward s_0: (obs, act, rew, next_obs)"""
    obs, act = torch.randn(n, 2), 2 * torch.rand(n, 2) - 1
    return obs, act, obs[:, 0].clone(), obs + 0.1 * act


class Run:
    """Stands in for the script's own where a loop is wanted without a folder."""

    def __init__(self):
        self.rows, self.parts = [], {}

    def steps(self, phase, total, every, **parts):
        self.parts[phase] = parts
        yield from range(1, (total or 10**9) + 1)

    def log(self, update, metrics):
        self.rows.append(metrics)


def test_squash_is_the_tanh_normal_of_torch_distributions():
    mean, log_std, noise = torch.randn(3, 50, 2).double()
    act, log_prob = m.squash(mean, log_std, noise)
    reference = Independent(TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform(cache_size=1)), 1)
    expected = reference.log_prob(act.clamp(-1 + 1e-9, 1 - 1e-9))
    inside = act.abs().amax(-1) < 0.999
    torch.testing.assert_close(log_prob[inside], expected[inside], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(m.squashed_log_prob(mean, log_std, act)[inside], log_prob[inside], rtol=1e-4, atol=1e-4)
    act = torch.tensor([[1.0, -1.0, 1.0], [0.0, 0.0, 0.0]])  # of the boundary it is finite
    log_prob = m.squashed_log_prob(torch.zeros(2, 3), torch.zeros(2, 3), act)
    assert log_prob.isfinite().all() and log_prob[1].item() == pytest.approx(-1.5 * math.log(2 * math.pi))


def test_descend_moves_the_parameters_of_its_optimizer_and_differentiates_for_no_other():
    a, b = nn.Parameter(torch.tensor(3.0)), nn.Parameter(torch.tensor(5.0))
    c = nn.Parameter(torch.tensor(2.0))
    opt = torch.optim.SGD([{"params": [a]}, {"params": [c], "lr": 1.0}], lr=0.1)
    for _ in range(2):  # gradients of the first step do not stay
        m.descend(opt, a * b + c)
    assert a.item() == pytest.approx(3 - 2 * 0.1 * 5) and c.item() == 0 and b.item() == 5 and b.grad is None


def test_dynamics_loss_is_the_gaussian_likelihood():
    dynamics = m.Dynamics(2, 2, ARGS)
    x, y = torch.randn(7, 5, 4), torch.randn(7, 5, 3)
    mean, logvar = dynamics(x)
    nll = -Normal(mean, (0.5 * logvar).exp()).log_prob(y).mean((1, 2))
    expected = (2 * nll - math.log(2 * math.pi)).sum() + 0.01 * 3 * (0.5 + 10)
    torch.testing.assert_close(dynamics.loss(x, y), expected)


def test_log_variance_bounds_are_soft_and_keep_a_gradient():
    dynamics, softplus = m.Dynamics(2, 2, ARGS), nn.functional.softplus
    raw = torch.tensor([-15.0, 0.0, 15.0])
    with torch.no_grad():  # the last layer's output, put in by hand
        dynamics.weight[-1].zero_()
        dynamics.bias[-1].copy_(torch.cat([torch.zeros(3), raw]).expand(7, 1, 6))
    _, logvar = dynamics(torch.zeros(7, 1, 4))
    torch.testing.assert_close(logvar[0, 0], -10 + softplus(0.5 - softplus(0.5 - raw) + 10))
    assert (logvar > -10).all() and (logvar <= 0.5 + math.log1p(math.exp(-10.5)) + 1e-6).all()
    assert (torch.autograd.grad(logvar.sum(), dynamics.bias[-1])[0][..., 3:] > 0).all()


def test_members_do_not_mix():
    dynamics = m.Dynamics(2, 2, ARGS)
    x = torch.randn(7, 5, 4)
    mean, logvar = dynamics(x)
    for e in range(7):
        alone = dynamics(x[e : e + 1], slice(e, e + 1))
        torch.testing.assert_close(alone[0][0], mean[e])
        torch.testing.assert_close(alone[1][0], logvar[e])
    grads = torch.autograd.grad(mean[2].square().sum(), list(dynamics.weight))
    assert all([e for e in range(7) if g[e].any()] == [2] for g in grads)


def test_bfloat16_model_is_close_and_its_outer_layers_are_not_rounded():
    full, half = m.Dynamics(2, 2, ARGS), m.Dynamics(2, 2, replace(ARGS, dynamics_bf16=True))
    half.load_state_dict(full.state_dict())
    x, y = torch.randn(7, 500, 4), torch.randn(7, 500, 3)
    for a, b in zip(*(torch.autograd.grad(d.loss(x, y), list(d.weight)) for d in (full, half)), strict=True):
        assert b.dtype == torch.float32 and 0 < (a - b).norm() < 0.05 * a.norm()
    (mean, logvar), (rough, rough_logvar) = full(x), half(x)
    assert rough.dtype == torch.float32 and (rough != rough.bfloat16()).any()
    assert 0 < (mean - rough).norm() < 0.02 * mean.norm() and (logvar - rough_logvar).abs().max() < 0.05
    near = torch.tensor([9.0, 9.001])[None, :, None].expand(7, 2, 4)  # states a millimetre apart are one in bfloat16
    assert near[0, 0, 0].bfloat16() == near[0, 1, 0].bfloat16() and (half(near)[0][:, 0] != half(near)[0][:, 1]).any()


def test_weight_decay_is_the_gradient_of_the_references_loss_term():
    dynamics = m.Dynamics(2, 2, replace(ARGS, dynamics_weight_decay=(0.1, 0.2, 0.3, 0.4, 0.5)))
    opt = dynamics.optimizer()
    assert [g["weight_decay"] for g in opt.param_groups] == [0.1, 0.2, 0.3, 0.4, 0.5, 0]
    assert all(g["params"][0] is w for g, w in zip(opt.param_groups, dynamics.weight, strict=False))
    assert type(opt) is torch.optim.Adam and not opt.param_groups[0]["decoupled_weight_decay"]


def test_sampled_rows_come_from_elites_only():
    dynamics = m.Dynamics(2, 2, ARGS)
    with torch.no_grad():  # member e predicts the constant e, almost without noise
        dynamics.weight[-1].zero_()
        for e in range(7):
            dynamics.bias[-1][e, 0] = torch.tensor([e, e, e, -30.0, -30.0, -30.0])
        dynamics.min_logvar.fill_(-30)
    dynamics.best_mse.copy_(torch.tensor([7.0, 1.0, 6.0, 2.0, 8.0, 3.0, 4.0]))
    assert dynamics.elites.tolist() == [1, 3, 5, 6, 2]  # the lowest holdout errors
    obs, rew = dynamics.sample(torch.zeros(3000, 2), torch.zeros(3000, 2))
    count = rew.round().long().bincount(minlength=7)
    assert count[[0, 4]].sum() == 0 and (count[[1, 2, 3, 5, 6]] > 500).all()  # 600 each, about
    torch.testing.assert_close(obs, rew[:, None].expand(-1, 2), atol=1e-4, rtol=0)  # state and reward of one member


def test_every_member_keeps_its_own_best_epoch():
    dynamics, currents = m.Dynamics(2, 2, ARGS), [m.Dynamics(2, 2, ARGS) for _ in range(3)]
    first = torch.ones(7)
    second = torch.tensor([0.5, 0.995, 2.0, 0.5, 1.0, 0.98, math.nan])  # 0.995 is no improvement by 1 %, nor is NaN
    third = torch.tensor([0.4, 0.991, 0.9, 0.6, 2.0, 0.98, 2.0])
    with torch.no_grad():
        for epoch, (current, mse) in enumerate(zip(currents, (first, second, third), strict=True), 1):
            for b in (*current.bias, current.max_logvar):
                b.normal_()
            dynamics.keep_best(current, mse, epoch)
    assert dynamics.best_epoch.tolist() == [3, 1, 3, 2, 1, 2, 1]
    torch.testing.assert_close(dynamics.best_mse, torch.tensor([0.4, 1.0, 0.9, 0.5, 1.0, 0.98, 1.0]))
    for i, kept in enumerate([*dynamics.weight, *dynamics.bias]):
        for e, epoch in enumerate(dynamics.best_epoch.tolist()):
            assert kept[e].equal([*currents[epoch - 1].weight, *currents[epoch - 1].bias][i][e])
    assert dynamics.max_logvar.equal(currents[-1].max_logvar)


@pytest.fixture(scope="module")
def trained():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    obs, act, rew, next_obs = toy()
    return m.train_dynamics(next_obs, act, rew, obs, replace(ARGS, dynamics_max_epochs=40), Run())


def test_learnt_reverse_model_undoes_the_forward_step(trained):
    obs, act, rew, next_obs = toy(500)
    before, reward = trained.sample(next_obs, act)
    assert (before - obs).abs().mean() < 0.02 < (next_obs - obs).abs().mean()
    torch.testing.assert_close((next_obs - before - 0.1 * act).mean(0), torch.zeros(2), atol=0.01, rtol=0)
    assert (reward - rew).abs().mean() < 0.05


def test_noise_of_the_system_is_learnt_as_variance():
    obs, act, rew, next_obs = toy(4000)
    noisy, run = obs + 0.1 * torch.randn_like(obs), Run()
    dynamics = m.train_dynamics(next_obs, act, rew, noisy, replace(ARGS, dynamics_max_epochs=25), run)
    fit = run.rows[-1]  # two noisy dimensions, an exact reward
    assert fit["model/elite_mse"].item() == pytest.approx(2 / 3 * 0.01, rel=0.2)
    _, logvar = dynamics(dynamics.inputs(next_obs, act).expand(7, -1, -1))
    assert logvar[dynamics.elites, :, 1:].exp().mean().item() == pytest.approx(0.01, rel=0.2)


def test_inputs_are_standardised_and_a_constant_column_keeps_its_scale():
    _, act, rew, next_obs = toy(300)
    next_obs = torch.cat([5 + 3 * next_obs, torch.full((300, 1), 0.3)], 1)
    dynamics = m.train_dynamics(
        next_obs, act, rew, next_obs, replace(ARGS, dynamics_max_epochs=1, holdout_max=1), Run()
    )
    x, clone = dynamics.inputs(next_obs, act), m.BehaviourCloning(next_obs, 2, 8, 0.0)
    torch.testing.assert_close(x.mean(0)[:2], torch.zeros(2), atol=0.02, rtol=0)
    torch.testing.assert_close(x.std(0)[[0, 1, 3, 4]], torch.ones(4), atol=0.02, rtol=0)
    torch.testing.assert_close(((next_obs - clone.mean) / clone.std)[:, :2].std(0), torch.ones(2), atol=1e-3, rtol=0)
    assert x[:, 2].abs().max() < 1e-5 and dynamics.std[2] == clone.std[2] == 1


def test_training_stops_on_the_sixth_stale_epoch_and_returns_the_best_weights():
    obs, act, rew, next_obs = toy(400)
    run, args = Run(), replace(ARGS, dynamics_lr=1e-12)
    dynamics = m.train_dynamics(next_obs, act, rew, obs, args, run)
    assert [r["model/epoch"] for r in run.rows] == list(range(1, 8))  # the first improves on infinity, then six do not
    assert dynamics.best_epoch.tolist() == [1] * 7
    assert (
        set(run.parts["dynamics"]) == {"dynamics", "current", "opt"} and run.parts["dynamics"]["dynamics"] is dynamics
    )


def test_vae_loss_is_reconstruction_plus_weighted_mean_kl(monkeypatch):
    vae = m.ConditionalVAE(2, 3, 32)
    next_obs, act, noise = torch.randn(5, 2), torch.rand(5, 3), torch.randn(5, 6)
    monkeypatch.setattr(torch, "randn_like", lambda x: noise)
    mean, log_std = vae.encoder(torch.cat([next_obs, act], -1)).chunk(2, -1)
    kl = kl_divergence(Normal(mean, log_std.exp()), Normal(0, 1)).mean()
    recon = (vae.decode(next_obs, mean + log_std.exp() * noise) - act).square().mean()
    torch.testing.assert_close(vae.loss(next_obs, act), recon + 0.5 * kl)
    vae.kl_weight = 2.0
    torch.testing.assert_close(vae.loss(next_obs, act), recon + 2 * kl)


def test_vae_samples_use_clipped_latents_and_depend_on_the_next_state():
    for clip, largest in ((0.5, 0.5), (math.inf, 2.5)):
        vae, seen = m.ConditionalVAE(2, 3, 32, latent_clip=clip), []
        decode = vae.decode
        vae.decode = lambda next_obs, latent: (seen.append(latent), decode(next_obs, latent))[1]
        act = vae.sample(5 * torch.randn(200, 2))
        assert (seen[0].abs().max() == largest) if clip == 0.5 else (seen[0].abs().max() > largest)
        assert (seen[0].abs() < 0.5).any() and act.abs().max() <= 1 and act.std(0).min() > 0


def test_rbc_is_maximum_likelihood():
    data = 3 + 2 * torch.randn(1000, 2)
    rbc = m.BehaviourCloning(data, 3, 32, 0.0)
    next_obs, act = data[:5], 0.9 * torch.rand(5, 3)
    mean, log_std = rbc(next_obs)
    reference = Independent(TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform()), 1)
    torch.testing.assert_close(rbc.loss(next_obs, act), -reference.log_prob(act).mean(), rtol=1e-4, atol=1e-4)
    bonus = m.BehaviourCloning(data, 3, 32, 0.5)
    bonus.load_state_dict(rbc.state_dict())
    torch.testing.assert_close(bonus.loss(next_obs, act), rbc.loss(next_obs, act) - 0.5 * log_std.sum(-1).mean())


def test_uniform_policy_is_uniform():
    act = m.train_rollout_policy(torch.zeros(1, 2), torch.zeros(1, 3), ARGS, None)(torch.zeros(100_000, 2))
    assert act.shape == (100_000, 3) and act.abs().max() <= 1
    torch.testing.assert_close(act.mean(0), torch.zeros(3), atol=0.01, rtol=0)
    torch.testing.assert_close(act.var(0), torch.full((3,), 1 / 3), atol=0.01, rtol=0)


@pytest.mark.parametrize("kind", ["cvae", "rbc"])
def test_learnt_rollout_policy_imitates_actions_given_the_state(kind):
    cond = torch.rand(500, 1).round()  # 0 or 1
    act, run = cond - 0.5 + 0.01 * torch.randn(500, 1), Run()
    args = replace(ARGS, rollout_policy=kind, rollout_policy_updates=150, vae_hidden=32, rbc_hidden=32, kl_weight=0.1)
    sample = m.train_rollout_policy(cond, act, replace(args, rollout_policy_lr=1e-2, log_every=50), run)
    assert (sample(cond) - act).abs().mean() < 0.15
    assert [r["model/rollout_policy_update"] for r in run.rows] == [50, 100, 150]
    assert set(run.parts["rollout_policy"]) == {"rollout_policy", "opt"}


def test_rows_are_drawn_in_proportion_to_what_their_return_exceeds_the_worst_by(monkeypatch):
    def counts(returns, size=30_000):
        draw = m.row_sampler(torch.arange(len(returns)), torch.tensor(returns, dtype=torch.float64))
        return draw(size).bincount(minlength=len(returns))

    count = counts([0.0, 5.0, 10.0])
    assert count[0] == 0 and abs(count[2] / count[1] - 2) < 0.1
    assert counts([-3.0, -3.0, -1.0])[:2].sum() == 0
    assert counts([3.0] * 4, 4000).min() > 800  # equal returns: uniform
    plain = m.row_sampler(torch.arange(4.0)[:, None])(4000)  # rows of any shape
    assert plain.shape == (4000, 1) and plain[:, 0].long().bincount().min() > 800
    monkeypatch.setattr(torch, "rand", lambda size, **_: torch.zeros(size).double())
    assert counts([0.0, 5.0, 10.0], 7).tolist() == [0, 7, 0]  # not even the smallest number leads to a weight of 0


def rule(task, **changes):
    """The rule for the end of an episode beside data of which it can say nothing: its rows have no successors."""
    z, obs = torch.zeros(10), torch.zeros(10, 29)
    data = Dataset(obs, torch.zeros(10, 8), z, obs.clone(), z.clone(), z > 0, z.long())
    data.terminated[:2], data.next_obs[:2, :2] = 1, torch.tensor([[3.5, 8.0], [4.5, 8.0]])
    return m.termination_fn(parse_task(task), data, replace(ARGS, **changes))


def test_termination_rules():
    def end(task, width, *changes, **flags):
        next_obs = torch.zeros(len(changes), width)
        for row, change in zip(next_obs, changes, strict=True):
            for i, v in change.items():
                row[i] = v
        return rule(task, **flags)(torch.zeros_like(next_obs), torch.zeros(len(next_obs), 1), next_obs).tolist()

    ok = {0: 1.25}
    fallen = [{0: 0.7}, {**ok, 1: 0.2}, {**ok, 1: -0.25}, {**ok, 7: 101.0}, {**ok, 7: -101.0}, {**ok, 5: math.nan}]
    assert end("hopper-medium", 11, ok, *fallen) == [False] + 6 * [True]
    assert end("hopper-medium", 11, ok, *fallen, imagined_ends=False) == 7 * [False]
    fallen = [{0: 0.8}, {0: 2.0}, {**ok, 1: 1.0}, {**ok, 1: -1.0}]
    assert end("walker2d-medium", 17, ok, *fallen) == [False] + 4 * [True]
    fallen = [{0: 0.19}, {0: 1.01}, {0: 0.5, 3: math.inf}]
    assert end("ant-medium", 27, {0: 0.2}, {0: 1.0}, *fallen) == 2 * [False] + 3 * [True]
    assert end("halfcheetah-medium", 17, {0: -9.0}) == end("maze2d-umaze", 4, {0: -9.0}) == [False]
    assert end("maze2d-umaze", 1, {0: -9.0}) == [False]  # as any other environment, even with one number per state
    # antmaze: the goal is the middle of the rewarded positions, (4, 8) here
    assert end("antmaze-umaze", 29, {0: 4.0, 1: 8.4}, {0: 4.0, 1: 8.6}) == [True, False]


@pytest.mark.parametrize("name", ["hopper", "walker2d", "ant"])
def test_termination_rules_are_gymnasiums(name):
    env, rng, ended, terminates = make_env(name), np.random.default_rng(0), [], rule(f"{name}-medium")
    for episode in range(3):
        env.reset(seed=episode)
        for t in range(150):
            if t % 25 == 24:  # into states that random torques do not reach
                qpos = env.unwrapped.data.qpos.copy()
                qpos[2 if name == "ant" else 1] = rng.uniform(0, 2.2)
                env.unwrapped.set_state(qpos, env.unwrapped.data.qvel.copy())
            obs, _, terminated, _, _ = env.step(rng.uniform(-1, 1, env.action_space.shape).astype(np.float32))
            obs = torch.as_tensor(obs, dtype=torch.float32)[None]
            ended.append(terminated)
            assert terminates(obs, None, obs).item() == terminated
            if terminated:
                env.reset(seed=100 + episode)
    assert 0 < sum(ended) < len(ended)


def imagine(dynamics, starts, terminates, **changes):
    policy = m.train_rollout_policy(starts, starts, ARGS, None)
    return m.imagine(m.row_sampler(starts), dynamics, policy, terminates, replace(ARGS, **changes))


def test_chains_run_backwards_from_states_of_the_data(trained):
    starts = torch.randn(50, 2)
    buffer, chains = imagine(trained, starts, rule("maze2d-umaze"), model_buffer_size=450, rollout_batch_size=50)
    obs, act, _, next_obs, terminated = (x.view(3, 3, 50, -1) for x in unpack(buffer, 2, 2))  # (calls, h, chains, ...)
    for call in range(3):
        assert all((starts == row).all(-1).any() for row in next_obs[call, 0])  # a chain ends at a state of the data
        assert torch.equal(next_obs[call, 1], obs[call, 0]) and torch.equal(next_obs[call, 2], obs[call, 1])
    forward, backward = ((obs + sign * 0.1 * act - next_obs).abs().mean() for sign in (1, -1))
    assert forward < 0.03 < backward  # rows run forward in time
    assert act.abs().max() <= 1 and terminated.sum() == 0
    for i in range(3):  # the chains to look at are the first, in the order imagined
        assert all(a.equal(b[0, i]) for a, b in zip(chains[i], (obs, act, next_obs), strict=True))


def test_a_chain_that_ended_stays_ended_and_the_buffer_is_exactly_full(trained):
    def given_end_on_the_left(obs, act, next_obs):
        return next_obs[:, 0] < 0

    buffer, chains = imagine(trained, torch.randn(100, 2), given_end_on_the_left, model_buffer_size=777)
    obs, _, _, next_obs, terminated = unpack(buffer, 2, 2)
    assert len(buffer) == 777 and buffer.isfinite().all()
    assert torch.equal(terminated > 0, next_obs[:, 0] < 0)  # judged by the given end, whatever was imagined before it
    assert 0 < terminated.mean() < 1
    stopped = obs[terminated > 0]
    assert not any((next_obs == row).all(-1).any() for row in stopped)  # nothing was imagined before a terminal row
    assert 0 < len(chains[0][0]) < 100 and all(a[0].equal(b[2]) for a, b in zip(chains, chains[1:], strict=False))


def test_log_sum_exp_is_the_integral_over_actions():
    N = 100_000
    act = 2 * torch.rand(1, 1, N).double() - 1
    q, log_density = (-2 * (act - 0.3) ** 2).expand(2, 1, N), torch.full((1, N), math.log(0.5)).double()
    penalty = m.conservative_penalty(torch.zeros(2, 1).double(), q, log_density) - math.log(N)
    grid = torch.linspace(-1, 1, 100_001).double()
    integral = torch.trapezoid((-2 * (grid - 0.3) ** 2).exp(), grid)
    assert penalty[0, 0].item() == pytest.approx(integral.log().item(), abs=0.01)


def test_penalty_pushes_down_sampled_actions_and_up_the_rows_own():
    q_data, q_sampled = torch.zeros(2, 4, requires_grad=True), torch.randn(2, 4, 9, requires_grad=True)
    m.conservative_penalty(q_data, q_sampled, torch.zeros(4, 9)).sum().backward()
    assert (q_data.grad == -1).all() and (q_sampled.grad > 0).all()
    torch.testing.assert_close(q_sampled.grad.sum(-1), torch.ones(2, 4))  # a softmax over all 3N, not over 3
    with pytest.raises(AssertionError):  # another number of actions
        m.conservative_penalty(torch.zeros(2, 4), torch.zeros(2, 12, 3), torch.zeros(4, 9))


def batch(n=3):
    return torch.randn(n, 4), 1.8 * torch.rand(n, 2) - 0.9, torch.randn(n), torch.randn(n, 4), torch.zeros(n)


@pytest.mark.parametrize("n", [1, 3])
def test_critic_loss_by_hand(n):
    """Same random numbers, plain loops: targets (a terminal row does not bootstrap), the three sources, densities."""
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

    def pi(state, z):
        mean, log_std = agent.policy(state[None])
        u = mean[0] + log_std[0].exp() * z
        return u.tanh(), Independent(Normal(mean[0], log_std[0].exp()), 1).log_prob(u) - (1 - u.tanh() ** 2).log().sum()

    for i in range(n):
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


def test_warm_up_clones_and_afterwards_follows_q():
    agent, (obs, act, *_) = m.CQL(4, 2, ARGS, CPU), batch(5)
    mean, log_std = agent.policy(obs)

    def loss(act, warm_up):
        torch.manual_seed(1)
        return agent.policy_loss(obs, act, torch.tensor(0.3), warm_up)[0]

    torch.manual_seed(1)
    new_act, log_prob = m.squash(mean, log_std, torch.randn_like(mean))
    clone, climb = m.squashed_log_prob(mean, log_std, act), agent.qf(obs, new_act).amin(0)
    torch.testing.assert_close(loss(act, True), (0.3 * log_prob - clone).mean())
    torch.testing.assert_close(loss(act, False), (0.3 * log_prob - climb).mean())
    assert loss(act, False).equal(loss(-act, False))  # after the warm-up the rows' own actions play no part


def parameters(agent):
    groups = {k: getattr(agent, k).parameters() for k in ("policy", "qf", "target_qf")}
    groups |= {f"alpha_{k}": [v] for k, v in agent.alphas.items()}
    return {k: [p.detach().clone() for p in ps] for k, ps in groups.items()}


def moved(agent, *update):
    before = parameters(agent)
    agent.update(*update)
    after = parameters(agent)
    return {k for k in before if any(not torch.equal(a, b) for a, b in zip(before[k], after[k], strict=True))}


def test_every_optimizer_moves_its_own_parameters():
    policy, critics = {"policy", "alpha_sac"}, {"qf", "target_qf"}
    for flags, warm_up, clone_only, expected in (
        ({}, False, False, policy | critics),
        ({}, True, False, policy | critics),  # the Q functions train in the warm-up too
        ({}, True, True, policy),
        ({"lagrange": True}, False, False, policy | critics | {"alpha_cql"}),
        ({"policy_lr": 1e-30}, False, False, critics | {"alpha_sac"}),  # which is 0 and notices
        ({"qf_lr": 1e-30}, False, False, policy),
    ):
        agent = m.CQL(4, 2, replace(ARGS, **flags), CPU)
        assert moved(agent, *batch(), warm_up, clone_only) == expected


def test_multipliers_rise_while_their_constraint_is_broken_and_target_networks_follow_slowly():
    for up in (True, False):  # entropy below its target, a penalty above its gap
        flags = dict(target_entropy=1e3 if up else -1e3, lagrange=True, lagrange_gap=-100.0 if up else 100.0)
        agent = m.CQL(4, 2, replace(ARGS, **flags), CPU)
        before, old = {k: v.item() for k, v in agent.alphas.items()}, parameters(agent)["target_qf"]
        agent.update(*batch(), False, False)
        assert all((v.item() > before[k]) == up for k, v in agent.alphas.items())
        for a, new, target in zip(old, agent.qf.parameters(), agent.target_qf.parameters(), strict=True):
            torch.testing.assert_close(target, a + 0.005 * (new.detach() - a))


def twins(**flags):
    """Two learners with the same weights; the second has the flags."""
    a, b = m.CQL(4, 2, ARGS, CPU), m.CQL(4, 2, replace(ARGS, **flags), CPU)
    for name, part in b.parts.items():
        part.load_state_dict(a.parts[name].state_dict())
    return a, b


def test_bfloat16_is_close_and_leaves_targets_alone():
    rows, out = batch(64), []
    for agent in twins(bf16=True):
        torch.manual_seed(5)
        out.append(agent.critic_loss(*rows))
    assert torch.equal(out[0][0], out[1][0]) and torch.equal(out[0][2]["q/target"], out[1][2]["q/target"])
    assert out[0][1] != out[1][1]
    torch.testing.assert_close(out[0][1], out[1][1], rtol=0.02, atol=0.02)


def test_compiled_losses_equal_eager_ones(monkeypatch):
    """Traced into whole graphs; left to eager kernels, because building C++ takes a minute."""
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, mode=None: compiled(f, backend="aot_eager", fullgraph=True))
    rows, out = batch(8), []
    for agent in twins(compile=True):
        torch.manual_seed(5)
        out.append([agent.update(*rows, warm_up, False) for warm_up in (True, False, False)])
    for eager, traced in zip(*out, strict=True):
        for k in eager:
            torch.testing.assert_close(eager[k], traced[k], rtol=1e-3, atol=1e-4)


def test_the_task_decides_what_the_user_left_open(capsys):
    def settings(name, **flags):
        a = m.resolve(m.Args(env=name, **flags), parse_task(name))
        return a.horizon, a.model_ratio, a.rollout_policy, a.priority_rollout, a.priority_policy, a.exp_name

    assert settings("hopper-medium-replay") == (5, 0.1, "uniform", True, True, "romi_cql")
    assert settings("maze2d-large-dense") == (5, 0.3, "uniform", False, False, "romi_cql")
    typed = dict(horizon=2, model_ratio=0.0, priority_policy=False)
    assert settings("hopper-medium", **typed) == (2, 0.0, "uniform", True, False, "cql")
    assert "only clones" not in capsys.readouterr().err
    assert settings("hopper-medium", model_ratio=0.0, bc_warmup=10, total_updates=10)[-1] == "bc"
    assert "only clones" in capsys.readouterr().err


WRONG = {"batch_size": 0, "gamma": 1.5, "qf_lr": -1.0, "tau": math.nan, "model_ratio": 1.5, "total_updates": -5}
WRONG |= {"dynamics_weight_decay": (0.1,), "hidden": (32, 0), "holdout_ratio": 1.0, "num_elites": 8}  # of 7 members


@pytest.mark.parametrize("flag, value", [*WRONG.items(), ("model_ratio", 1e-4)])  # leaves no imagined rows of a batch
def test_settings_that_cannot_work_are_refused_by_name(flag, value):
    with pytest.raises(UserError, match=f"--{flag.replace('_', '-')} "):
        m.resolve(m.Args(**{flag: value}), parse_task("hopper-medium-replay"))


def test_a_constant_column_is_not_blown_up_by_cloning():
    cond = torch.cat([torch.randn(100, 1), torch.full((100, 1), 0.1)], 1)
    std = m.BehaviourCloning(cond, 2, 8, 0.0).std
    assert std[1] == 1 and std[0] == cond[:, 0].std() + 1e-6


def test_a_rule_for_ends_that_the_data_contradict_is_refused_unless_switched_off():
    obs = torch.zeros(100, 11)
    obs[:, 0] = 1.25  # stands
    flags = torch.zeros(100)
    flags[:5] = 1  # and is said to have fallen
    rows = dict(obs=obs, act=torch.zeros(100, 3), rew=flags, next_obs=obs, has_next=flags == flags)
    fallen = Dataset(terminated=flags, trajectory=torch.arange(100), path="x.hdf5", **rows)
    task = parse_task("hopper-medium")
    with pytest.raises(
        UserError, match=r"x\.hdf5: the termination rule of hopper is wrong for 5\.0% .*--no-imagined-ends"
    ):
        m.termination_fn(task, fallen, m.Args())
    assert not m.termination_fn(task, fallen, m.Args(imagined_ends=False))(obs, None, obs).any()
    m.termination_fn(task, Dataset(terminated=0 * flags, trajectory=torch.arange(100), **rows), m.Args())
