"""Facts about MOPO and COMBO: penalties, rollouts, buffer and conservative term against numbers worked by hand."""

import math
from dataclasses import replace

import combo
import mopo
import pytest
import romi_cql
import torch
import tyro

from utils import Dataset, UserError, parse_task, unpack

CPU = torch.device("cpu")
HOPPER = parse_task("hopper-medium-replay")
SMALL = dict(dynamics_hidden=16, hidden=(16,), rollout_starts=200, horizon=4, batch_size=20, policy_lr=1e-3)
MOPO = mopo.Args(**SMALL, policy_lr_decay=0, penalty_coef=2.0)
COMBO = combo.Args(**SMALL, policy_lr_decay=0, beta=3.0, rollout_policy="policy", rho_states="mix", model_ratio=0.5)
COMBO = replace(COMBO, qf_lr=1e-3, cql_samples=3)
both = pytest.mark.parametrize("m, args", [(mopo, MOPO), (combo, COMBO)], ids=["mopo", "combo"])


@pytest.fixture(autouse=True)
def seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


class FixedModel:
    """7 members whose means move state 0 by `step` and nothing else, with given standard deviations (7, 1+O)."""

    def __init__(self, std=1e-3, step=0.0, reward=1.0):
        self.spread = torch.full((7, 3), std) if isinstance(std, float) else std
        self.step, self.reward, self.elites = step, reward, torch.arange(5)
        self.mean, self.std = torch.full((4,), 0.5), torch.full((4,), 2.0)  # of the inputs

    def inputs(self, cond, act):
        return (torch.cat([cond, act], -1) - self.mean) / self.std

    def raw(self, x):
        return x * self.std + self.mean

    def __call__(self, x, members=slice(None)):
        mean = torch.zeros(len(x), x.shape[1], 3)
        mean[..., 0], mean[..., 1] = self.reward, self.step
        return mean, 2 * self.spread[members].log()[:, None].expand(-1, x.shape[1], -1)

    def sample(self, cond, act):
        out = cond.clone()
        out[:, 0] += self.step
        return out, torch.full((len(cond),), self.reward)


def still(obs):
    """A policy that stands still."""
    return torch.zeros(len(obs), 2), torch.full((len(obs), 2), -5.0)


def never(obs, act, next_obs):
    return torch.zeros(len(obs), dtype=torch.bool)


def imagined(m, args, model=None, policy=still, starts=None, terminates=never):
    """obs, act, rew, next_obs, terminated, and what was logged"""
    starts = torch.randn(50, 2) if starts is None else starts
    rows, stats = m.imagine(starts, model or FixedModel(), policy, terminates, args)
    return *unpack(rows, 2, 2), stats


# --- penalty ---


def test_penalty_is_the_largest_norm_of_the_predicted_standard_deviations():
    std = torch.tensor([[3.0, 4.0], [1.0, 1e-6]])  # reward and one state dimension
    for mean in (torch.zeros(2, 1, 2), 100 * torch.randn(2, 1, 2)):  # means do not matter
        assert mopo.penalty_of("aleatoric", mean, 2 * std.log()[:, None]).item() == pytest.approx(5.0)


def test_other_penalties_measure_how_members_disagree_about_the_state():
    mean = torch.tensor([[[9.0, 0.0, 0.0]], [[-9.0, 6.0, 0.0]], [[0.0, 0.0, 3.0]]])  # mean state (2, 1)
    logvar = torch.randn(3, 1, 3)
    # distances to (2, 1): sqrt 5, sqrt 17, sqrt 8; variances over members: 8 and 2; rewards do not matter
    assert mopo.penalty_of("pairwise_diff", mean, logvar).item() == pytest.approx(17**0.5)
    assert mopo.penalty_of("ensemble_std", mean, logvar).item() == pytest.approx(5**0.5)


def test_imagined_rewards_are_penalised_by_all_members_not_only_elites():
    std = torch.full((7, 3), 1e-6)
    std[6, :2] = torch.tensor([3.0, 4.0])  # the seventh is no elite; u = 5, r = 1, lambda = 2: -9
    *_, rew, _, _, stats = imagined(mopo, MOPO, FixedModel(std))
    assert rew.tolist() == pytest.approx([-9.0] * 800)
    assert stats["model/penalty_mean"].item() == stats["model/penalty_max"].item() == pytest.approx(5.0)
    for k in ("min", "max", "mean"):  # as the data's: without the penalty
        assert stats[f"model/imagined_reward_{k}"].item() == pytest.approx(1.0, abs=1e-5)
    for flags in ({"penalty": "pairwise_diff"}, {"penalty": "ensemble_std"}, {"penalty_coef": 0.0}):  # members agree
        rew = imagined(mopo, replace(MOPO, **flags), FixedModel(std))[2]
        assert rew.tolist() == pytest.approx([1.0] * 800)


def test_penalty_is_that_of_the_state_before_the_step():
    class Foggy(FixedModel):
        """Uncertain where state 0 is large: spread = state 0."""

        def __call__(self, x, members=slice(None)):
            return super().__call__(x)[0], 2 * self.raw(x)[..., :1].abs().log().expand(-1, -1, 3)

    rew = imagined(mopo, MOPO, Foggy(step=1.0), starts=torch.full((5, 2), 2.0))[2].view(4, 200)
    for i in range(4):  # states 2, 3, 4, 5: 1 - 2 sqrt(3) s
        assert rew[i].tolist() == pytest.approx([1 - 2 * 3**0.5 * (2 + i)] * 200, rel=1e-5)


def test_bfloat16_changes_the_penalty_by_its_rounding_only():
    starts, model, outcomes = torch.randn(50, 2), mopo.Dynamics(2, 2, MOPO), []
    for p in model.weight:
        torch.nn.init.normal_(p, std=0.3)
    for bf16 in (False, True):
        torch.manual_seed(1)
        outcomes.append(imagined(mopo, replace(MOPO, bf16=bf16), model, starts=starts))
    (obs, act, rew, *_, x), (obs_16, act_16, rew_16, *_, y) = outcomes
    assert torch.equal(obs, obs_16) and torch.equal(act, act_16)
    assert 0 < (rew - rew_16).abs().max() < 0.05 * 2 * x["model/penalty_max"]
    assert y["model/penalty_mean"].item() == pytest.approx(x["model/penalty_mean"].item(), rel=0.02)


# --- rollouts ---


@both
def test_rollouts_start_in_the_data_and_follow_the_model(m, args):
    starts = torch.randn(50, 2)
    obs, _, _, next_obs, terminated, _ = imagined(m, args, FixedModel(step=0.1), starts=starts)
    assert len(obs) == 4 * 200 and not terminated.any()
    obs, next_obs = obs.view(4, 200, 2), next_obs.view(4, 200, 2)
    assert all((o == starts).all(1).any() for o in obs[0])
    assert torch.equal(obs[1:], next_obs[:-1])  # forwards, bit for bit


@both
def test_rollouts_draw_their_actions_from_the_policy(m, args):
    wide = lambda obs: (torch.full((len(obs), 2), 0.3), torch.zeros(len(obs), 2))  # noqa: E731
    act = imagined(m, replace(args, rollout_starts=20_000, horizon=1), policy=wide)[1].atanh()
    assert act.mean().item() == pytest.approx(0.3, abs=0.03) and act.std().item() == pytest.approx(1.0, abs=0.03)


def test_uniform_rollouts_change_the_actions_only():
    args = replace(COMBO, rollout_policy="uniform", rollout_starts=20_000, horizon=1)
    act = imagined(combo, args)[1]
    assert act.abs().max() <= 1 and act.mean().abs() < 0.02 and act.var().item() == pytest.approx(1 / 3, abs=0.01)
    assert imagined(combo, COMBO)[1].abs().max() < 0.05  # of the policy, which stands still


@both
def test_a_rollout_that_ended_does_not_go_on(m, args):
    starts = torch.tensor([[0.0, 0.0], [0.25, 0.0]])
    ends = lambda obs, act, next_obs: next_obs[:, 0] > 0.35  # noqa: E731 - after 4 steps from 0, after 2 from 0.25
    outcome = imagined(m, args, FixedModel(step=0.1), starts=starts, terminates=ends)
    obs, _, _, next_obs, terminated, stats = outcome
    late = (obs[:200, 0] == 0.25).sum().item()
    assert 0 < late < 200 and len(obs) == 2 * late + 4 * (200 - late)
    assert torch.equal(terminated > 0, next_obs[:, 0] > 0.35) and terminated.sum() == 200
    assert obs[:, 0].max() < 0.36 and stats["model/imagined_terminated"].item() == pytest.approx(200 / len(obs))


@both
def test_all_rollouts_may_end_at_once(m, args):
    terminated = imagined(m, args, terminates=lambda *rows: ~never(*rows))[4]
    assert len(terminated) == 200 and terminated.all()


# --- buffer ---


def buffer(m, args, monkeypatch, rows_of=lambda call: 10):
    """A ModelBuffer whose rollouts are rows full of their number, 1, 2, ...; and a list of draws and policies used."""
    calls, starts = [], torch.randn(5, 11)

    def imagine(given, dynamics, policy, terminates, args):
        assert given is starts
        calls.append((torch.rand(1).item(), {k: v.clone() for k, v in policy.state_dict().items()}))
        return torch.full((rows_of(len(calls)), 27), float(len(calls))), {"rollout": len(calls)}

    monkeypatch.setattr(m, "imagine", imagine)
    return m.ModelBuffer(starts, m.Dynamics(11, 3, args), never, args), calls


@both
def test_the_buffer_holds_the_last_rollouts_and_nothing_else(m, args, monkeypatch):
    policy, before = m.Policy(11, 3, args.hidden), None
    stored, _ = buffer(m, args, monkeypatch, rows_of=lambda call: 10 * call)
    before = torch.get_rng_state()
    for i in range(6):
        assert stored.add(1_000 * i, policy.state_dict()) == {"rollout": i + 1}
        assert stored.rows[:, 0].unique().tolist() == list(range(max(1, i - 3), i + 2))  # the sixth replaces the first
    assert torch.equal(before, torch.get_rng_state())  # the learner's random numbers do not depend on rollouts
    assert len(stored.rows) == 20 + 30 + 40 + 50 + 60
    drawn = m.draw(stored.rows, 20_000)[:, 0]
    for i in range(2, 7):  # every row is as likely as any other
        assert (drawn == i).float().mean().item() == pytest.approx(i / 20, abs=0.02)


@both
def test_a_checkpoint_gives_the_same_rollouts_again(m, args, monkeypatch):
    policies = [m.Policy(11, 3, args.hidden).state_dict() for _ in range(7)]
    stored, calls = buffer(m, args, monkeypatch)
    for i, policy in enumerate(policies):
        stored.add(1_000 * i, policy)
    seeds, used = zip(*calls, strict=True)
    assert len(set(seeds)) == 7  # a seed of its own each
    again, calls = buffer(m, args, monkeypatch)
    again.load_state_dict(stored.state_dict())
    assert [seed for seed, _ in calls] == list(seeds[-5:])
    kept = [weights for _, weights in again.state_dict()["rollouts"]]
    for policy, *others in zip(policies[-5:], used[-5:], kept, [weights for _, weights in calls], strict=True):
        for k, v in policy.items():  # the policy at hand imagines, and each snapshot is its own
            assert all(torch.equal(v, other[k]) for other in others)


@both
def test_rows_that_are_not_finite_end_the_run(m, args, monkeypatch):
    stored, _ = buffer(m, args, monkeypatch)
    monkeypatch.setattr(m, "imagine", lambda *rest: (torch.full((3, 27), math.nan), {}))
    with pytest.raises(UserError, match="diverged") as error:
        stored.add(0, m.Policy(11, 3, args.hidden).state_dict())
    assert error.value.status == 3


@pytest.mark.parametrize("m, real", [(mopo, 12), (combo, 128)])
def test_main_trains_a_forward_model_and_mixes_real_and_imagined_rows(m, real, monkeypatch, tmp_path):
    has_next, fitted, rollouts, batches = torch.arange(300) % 10 != 9, [], [], []
    columns = torch.randn(300, 11), torch.zeros(300, 3), torch.zeros(300), torch.randn(300, 11), torch.zeros(300)
    data = Dataset(*columns, has_next, None, source="d4rl")

    def train_dynamics(cond, act, rew, pred, args, run):
        fitted.extend((cond, pred))
        return m.Dynamics(11, 3, args)

    def imagine(starts, dynamics, policy, terminates, args):
        rollouts.append(len(batches))
        return torch.full((9, 27), 7.0), {}

    def update(self, obs, *rest):
        batches.append((obs[:, 0] == 7).tolist())
        return {}

    monkeypatch.setattr(m, "train_dynamics", train_dynamics)
    monkeypatch.setattr(m, "imagine", imagine)
    monkeypatch.setattr(mopo.SAC if m is mopo else combo.COMBO, "update", update)
    monkeypatch.setattr(m, "load_dataset", lambda task, source: data)
    flags = dict(eval_episodes=0, imagined_ends=False, num_threads=1, run_dir=str(tmp_path))
    m.main(m.Args(total_updates=5, rollout_every=2, **flags))
    assert torch.equal(fitted[0], data.obs[has_next])  # elsewhere a model would learn resets as physics
    assert torch.equal(fitted[1], data.next_obs[has_next])  # forwards
    assert rollouts == [0, 2, 4]
    assert batches == [[False] * real + [True] * (256 - real)] * 5  # real rows first: COMBO's learner relies on it


# --- learner ---


def batch(n=40):
    return torch.randn(n, 2), 2 * torch.rand(n, 2) - 1, torch.randn(n), torch.randn(n, 2), (torch.rand(n) < 0.3).float()


def learner(args):
    return (mopo.SAC if isinstance(args, mopo.Args) else combo.COMBO)(2, 2, args, CPU)


def critic_loss(agent, rows):
    return agent.critic_loss(*rows, torch.tensor(0.5) if isinstance(agent, mopo.SAC) else 20)


def update(agent, step=1):
    return agent.update(*batch(), *([] if isinstance(agent, mopo.SAC) else [20]), step)


def set_q(qf, *values):
    """Q functions that are the same everywhere."""
    for q, value in zip((qf.q1, qf.q2), values, strict=True):
        torch.nn.init.zeros_(q[-1].weight)
        torch.nn.init.constant_(q[-1].bias, value)


@both
def test_the_target_is_the_smaller_of_the_target_networks(m, args):
    agent, rows = learner(args), batch()

    def target(*values):
        set_q(agent.target_qf, *values)
        torch.manual_seed(1)
        return critic_loss(agent, rows)[1]["q/target"].item()

    set_q(agent.qf, 100.0, 200.0)
    assert target(3.0, 5.0) == target(5.0, 3.0) == target(3.0, 9.0)
    rise = 0.99 * (1 - rows[4]).mean().item()  # one more in Q is gamma more in the target of rows that go on
    assert target(4.0, 4.0) == pytest.approx(target(3.0, 5.0) + rise, rel=1e-4)


def test_sac_target_is_the_soft_value_unless_the_state_was_terminal():
    agent = learner(MOPO)
    set_q(agent.qf, 3.0, 3.0)
    set_q(agent.target_qf, 3.0, 3.0)
    torch.nn.init.zeros_(agent.policy.net[-1].weight)
    torch.nn.init.zeros_(agent.policy.net[-1].bias)
    obs, act, rew, next_obs, _ = batch()
    for ended in (0.0, 1.0):
        torch.manual_seed(1)
        loss, metrics = agent.critic_loss(obs, act, rew, next_obs, torch.full((40,), ended), torch.tensor(0.5))
        torch.manual_seed(1)
        log_prob = mopo.squash(torch.zeros(40, 2), torch.zeros(40, 2), torch.randn(40, 2))[1]
        target = rew + 0.99 * (1 - ended) * (3.0 - 0.5 * log_prob)
        assert loss.item() == pytest.approx(2 * (3.0 - target).square().mean().item(), rel=1e-5)
        assert metrics["q/target"].item() == pytest.approx(target.mean().item(), rel=1e-5)


@both
def test_temperature_rises_when_entropy_is_below_its_target(m, args):
    for target, sign in ((50.0, 1), (-50.0, -1)):
        agent = learner(replace(args, target_entropy=target))
        update(agent)
        assert math.copysign(1, agent.alphas["sac"].item()) == sign


@both
def test_an_update_takes_its_steps_in_order_with_the_temperature_at_hand(m, args, monkeypatch):
    agent, order, alphas = learner(args), [], []
    torch.nn.init.constant_(agent.alphas["sac"], math.log(0.3))
    plain_critic, plain_policy, plain_descend = agent.critic_loss, agent.policy_loss, m.descend
    monkeypatch.setattr(m, "descend", lambda opt, loss: (order.append(opt), plain_descend(opt, loss)))
    monkeypatch.setattr(agent, "critic_loss", lambda *rows: (alphas.append(rows[-1]), plain_critic(*rows))[1])
    monkeypatch.setattr(agent, "policy_loss", lambda obs, alpha: (alphas.append(alpha), plain_policy(obs, alpha))[1])
    metrics = update(agent)
    assert order == [agent.qf_opt, agent.policy_opt]
    alphas = alphas[m is combo :]  # COMBO's critic has none: no entropy in the backup
    assert [a.item() for a in [*alphas, metrics["q/alpha"]]] == pytest.approx([0.3] * (len(alphas) + 1))


@both
def test_policy_rate_follows_its_cosine_and_the_temperature_keeps_its_own(m, args):
    agent = learner(replace(args, policy_lr_decay=100))
    for step, rate in ((1, 1.0), (51, 0.5), (101, 0.0), (151, 0.0)):
        update(agent, step)
        assert [g["lr"] for g in agent.policy_opt.param_groups] == pytest.approx([rate * 1e-3, 1e-3])
    before, alpha = [p.clone() for p in agent.policy.parameters()], agent.alphas["sac"].item()
    update(agent, 152)
    assert all(torch.equal(a, b) for a, b in zip(before, agent.policy.parameters(), strict=True))
    assert agent.alphas["sac"].item() != alpha


# --- conservative term ---


def test_soft_maximum_of_a_constant_is_the_volume_of_the_box():
    q, density = torch.full((2, 5, 12), 7.0), torch.full((5, 12), 3 * math.log(0.5))
    assert combo.soft_maximum(q, density)[0].tolist() == pytest.approx([7 + 3 * math.log(2) + math.log(12)] * 5)
    with pytest.raises(AssertionError):
        combo.soft_maximum(q.view(2, 20, 3), density)  # 3 terms where 3N belong


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_soft_maximum_is_the_integral_over_actions(temperature):
    """Q(a) = sin 3a on [-1, 1], actions drawn uniformly and around 0.2: T log of the integral of exp(Q / T)."""
    grid, half = torch.linspace(-1, 1, 20_001), 100_000
    exact = temperature * torch.trapezoid((torch.sin(3 * grid) / temperature).exp(), grid).log().item()
    normal = torch.distributions.Normal(0.0, 0.5)
    u = normal.sample((half,))
    acts = torch.cat([2 * torch.rand(half) - 1, u.tanh()])
    density = torch.cat([torch.full((half,), math.log(0.5)), normal.log_prob(u) - (1 - u.tanh() ** 2).log()])
    estimate = combo.soft_maximum(torch.sin(3 * acts).expand(2, 1, -1), density[None], temperature)
    expected = [exact + temperature * math.log(2 * half)] * 2  # up to the log of the number of terms
    assert estimate[:, 0].tolist() == pytest.approx(expected, abs=0.02)


def test_bfloat16_leaves_targets_alone_and_changes_the_conservative_term_by_its_rounding():
    a, b = (learner(replace(COMBO, hidden=(16, 16, 16), bf16=bf16)) for bf16 in (False, True))
    rows, out = batch(), []
    for agent in (a, b):
        for k, part in agent.parts.items():
            part.load_state_dict(a.parts[k].state_dict())
        torch.manual_seed(5)
        out.append(critic_loss(agent, rows)[1])
    assert torch.equal(out[0]["q/target"], out[1]["q/target"]) and torch.equal(out[0]["q/data"], out[1]["q/data"])
    full, rounded = (o["losses/conservative"].item() for o in out)
    assert full != rounded == pytest.approx(full, rel=0.01)


@pytest.mark.parametrize("where, rows", [("mix", 40), ("model", 30)])
def test_every_state_of_rho_is_pushed_down_with_3n_actions(monkeypatch, where, rows):
    agent, shapes, seen, data = learner(replace(COMBO, rho_states=where)), [], [], batch()
    plain, plain_q = combo.soft_maximum, agent.qf.forward
    monkeypatch.setattr(combo, "soft_maximum", lambda q, *rest: (shapes.append(q.shape), plain(q, *rest))[1])
    monkeypatch.setattr(agent.qf, "forward", lambda obs, act: (seen.append(obs), plain_q(obs, act))[1])
    agent.critic_loss(*data, 10)
    assert torch.equal(seen[1], data[0][40 - rows :, None].expand(-1, 9, -1))  # real rows stand first
    agent.critic_loss(*batch(), 40)  # no imagined rows at all: the states that there are
    assert shapes == [(2, rows, 9), (2, 40, 9)]


def conservative(agent, rows, num_real):
    """The conservative term alone, both Q functions: the loss less that without it, on the same random numbers."""
    losses = []
    for agent.args in (replace(COMBO, beta=0.0), COMBO):
        torch.manual_seed(2)
        losses.append(agent.critic_loss(*rows, num_real)[0])
    return losses[1] - losses[0]


def test_only_real_rows_are_pushed_up_each_by_beta_over_their_number(monkeypatch):
    agent, rows, seen = learner(COMBO), batch(), []
    plain_q = agent.qf.forward

    def spy(obs, act):
        seen.append(plain_q(obs, act))
        seen[-1].retain_grad()
        return seen[-1]

    monkeypatch.setattr(agent.qf, "forward", spy)
    conservative(agent, rows, 10).backward()
    on_rows = seen[0].grad + seen[2].grad  # TD gradients of the two losses cancel
    expected = torch.zeros(2, 40)
    expected[:, :10] = -3.0 / 10
    torch.testing.assert_close(on_rows, expected, atol=1e-6, rtol=0)
    down = seen[3].grad  # (2, B, 3N): a softmax for every state, so its gradient sums to beta
    assert (down >= 0).all() and down.sum((1, 2)).tolist() == pytest.approx([3.0, 3.0], rel=1e-4)


def test_a_step_on_the_term_alone_lowers_q_off_the_data_and_raises_it_on_the_data():
    agent, (obs, act, *rest) = learner(COMBO), batch()
    opt, anywhere = torch.optim.SGD(agent.qf.parameters(), lr=1e-2), 2 * torch.rand(40, 2) - 1

    def gap():
        return agent.qf(obs, act)[:, :10].mean().item() - agent.qf(obs, anywhere).mean().item()

    before = gap()
    for _ in range(20):
        opt.zero_grad()
        conservative(agent, (obs, act, *rest), 10).backward()
        opt.step()
    assert gap() > before + 0.05


def test_without_beta_it_is_sac_on_the_mix_without_entropy_in_the_backup():
    agent = learner(replace(COMBO, beta=0.0))
    set_q(agent.qf, 3.0, 3.0)
    set_q(agent.target_qf, 3.0, 3.0)
    obs, act, rew, next_obs, terminated = batch()
    loss, _ = agent.critic_loss(obs, act, rew, next_obs, terminated, 10)
    target = rew + 0.99 * (1 - terminated) * 3.0
    assert loss.item() == pytest.approx(2 * (3.0 - target).square().mean().item(), rel=1e-5)


def test_without_model_rows_the_critic_loss_is_that_of_cql(monkeypatch):
    other = romi_cql.CQL(2, 2, romi_cql.Args(hidden=(16,), cql_samples=3, cql_alpha=3.0), CPU)
    mine, rows = learner(COMBO), batch()
    for name in ("policy", "qf", "target_qf"):
        mine.parts[name].load_state_dict(other.parts[name].state_dict())
    # the two draw in another order: no noise, and the same uniform numbers
    monkeypatch.setattr(torch, "randn", lambda *size, device=None: torch.zeros(*size))
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    monkeypatch.setattr(torch, "rand", lambda *size, device=None: torch.linspace(0, 1, math.prod(size)).view(size))
    td_loss, penalty, _ = other.critic_loss(*rows)
    loss, metrics = mine.critic_loss(*rows, 40)
    assert loss.item() == pytest.approx((td_loss + 3.0 * penalty).item(), rel=1e-5)
    assert metrics["losses/conservative"].item() == pytest.approx(penalty.item(), rel=1e-5)


# --- model error ---


@both
def test_model_error_is_measured_along_real_episodes(m, args):
    """State 0 grows by 1 a step; the model says 0.9: errors 0.1 and 0.4 there, of two dimensions with deviation 2."""
    long, short = torch.stack([torch.arange(9.0), torch.zeros(9)], 1).numpy(), torch.zeros(3, 2).numpy()
    model, act = FixedModel(step=0.9), lambda obs: torch.zeros(len(obs), 2)
    errors = m.model_error(model, act, [long], 4)
    assert errors["model/true_error_1"].item() == pytest.approx(0.05 / 2**0.5, rel=1e-4)
    assert errors["model/true_error_4"].item() == pytest.approx(0.2 / 2**0.5, rel=1e-4)
    assert m.model_error(model, act, [long], 1).keys() == {"model/true_error_1"}
    assert m.model_error(model, act, [short], 4).keys() == {"model/true_error_1"}  # too short for four


@both
def test_model_error_follows_the_actions_of_the_episode(m, args):
    """The true system and the model both add the action: no error, unless actions and states get out of step."""

    class Adds(FixedModel):
        def __call__(self, x, members=slice(None)):
            return torch.cat([torch.zeros(*x.shape[:2], 1), self.raw(x)[..., 2:]], -1), None

    states = [torch.randn(2)]
    act = lambda obs: torch.stack([obs[:, 1].sin(), obs[:, 0].cos()], 1)  # noqa: E731
    for _ in range(10):
        states.append(states[-1] + act(states[-1][None])[0])
    errors = m.model_error(Adds(), act, [torch.stack(states).numpy()], 3)
    assert errors["model/true_error_1"] < 1e-6 and errors["model/true_error_3"] < 1e-6


# --- settings ---


def resolved(m, *flags):
    args = tyro.cli(m.Args, args=flags)
    return m.resolve(args, parse_task(args.env))


def settings(args, names):
    return tuple(getattr(args, name) for name in names.split())


def test_settings_come_from_preset_and_task():
    names = "horizon penalty_coef policy_lr policy_lr_decay total_updates target_entropy exp_name"
    assert settings(resolved(mopo), names) == (5, 2.5, 1e-4, 3_000_000, 3_000_000, None, "mopo")
    a = resolved(mopo, "--preset", "v0", "--env", "halfcheetah-medium-expert")
    assert settings(a, names) == (5, 5.0, 3e-4, 0, 1_000_000, -3, "mopo_v0")
    assert resolved(mopo, "--penalty-coef", "0").exp_name == "mbpo"
    assert resolved(mopo, "--model-ratio", "0").exp_name == "sac"
    assert resolved(mopo, "--total-updates", "7").policy_lr_decay == 3_000_000  # more updates later are the same run
    names = "horizon beta rollout_policy rho_states model_ratio qf_lr policy_lr policy_lr_decay exp_name"
    a = resolved(combo, "--env", "hopper-medium")
    assert settings(a, names) == (5, 5.0, "policy", "mix", 0.5, 3e-4, 1e-4, 1_000_000, "combo")
    a = resolved(combo, "--preset", "v0", "--env", "walker2d-medium-expert")
    assert settings(a, names) == (1, 5.0, "policy", "mix", 0.2, 1e-4, 1e-5, 0, "combo_v0")
    a = resolved(combo, "--preset", "v0", "--env", "hopper-medium-replay")
    assert settings(a, names) == (5, 1.0, "uniform", "model", 0.5, 3e-4, 1e-4, 0, "combo_v0")
    assert resolved(combo, "--beta", "0").exp_name == "combo_beta0"


def test_settings_that_cannot_work_are_refused():
    for m in (mopo, combo):  # past its decay the rate would be 0 while the temperature drifts on
        with pytest.raises(UserError, match="rate is 0"):
            resolved(m, "--total-updates", "3000001")
        assert resolved(m, "--total-updates", "3000001", "--policy-lr-decay", "0").policy_lr_decay == 0
        with pytest.raises(UserError, match="leaves no imagined rows"):
            resolved(m, "--model-ratio", "1e-9")
    with pytest.raises(UserError, match="leaves no real rows"):
        resolved(combo, "--model-ratio", "1")
    with pytest.raises(UserError, match="needs an ensemble"):
        resolved(mopo, "--penalty", "pairwise_diff", "--ensemble-size", "1", "--num-elites", "1")


def test_defaults_are_the_papers():
    for m, hidden, ratio in ((mopo, (256, 256), 0.95), (combo, (256, 256, 256), 0.5)):
        args = m.resolve(m.Args(), HOPPER)
        assert settings(args, "rollout_starts rollout_every rollouts_kept model_ratio") == (50_000, 1_000, 5, ratio)
        assert settings(args, "hidden qf_lr batch_size gamma tau") == (hidden, 3e-4, 256, 0.99, 0.005)
        assert settings(args, "ensemble_size num_elites dynamics_hidden") == (7, 5, 200)
    assert combo.Args().cql_samples == 10


TABLES = {  # spec/algorithms.md 6b, 7b: horizon and lambda, horizon and beta; random, medium, -replay, -expert
    (mopo, "v0", "halfcheetah"): ((5, 0.5), (1, 1), (5, 1), (5, 5)),
    (mopo, "v0", "hopper"): ((5, 1), (5, 5), (5, 1), (5, 1)),
    (mopo, "v0", "walker2d"): ((1, 1), (5, 5), (1, 1), (1, 2)),
    (mopo, "v2", "halfcheetah"): ((5, 0.5), (5, 0.5), (5, 0.5), (5, 2.5)),
    (mopo, "v2", "hopper"): ((5, 1), (5, 5), (5, 2.5), (5, 5)),
    (mopo, "v2", "walker2d"): ((1, 1), (5, 0.5), (1, 2.5), (1, 2.5)),
    (combo, "v0", "halfcheetah"): ((5, 0.5), (5, 0.5), (5, 0.5), (5, 0.5)),
    (combo, "v0", "hopper"): ((5, 1), (5, 5), (5, 1), (5, 5)),
    (combo, "v0", "walker2d"): ((1, 0.5), (1, 5), (1, 0.5), (1, 5)),
    (combo, "v2", "halfcheetah"): ((5, 0.5), (5, 0.5), (5, 0.5), (5, 5)),
    (combo, "v2", "hopper"): ((5, 1), (5, 5), (5, 0.5), (5, 5)),
    (combo, "v2", "walker2d"): ((1, 0.5), (1, 5), (1, 0.5), (1, 5)),
}


@pytest.mark.parametrize("m, preset, robot", TABLES)
def test_every_task_of_the_tables_gets_its_settings(m, preset, robot):
    for kind, row in zip(("random", "medium", "medium-replay", "medium-expert"), TABLES[m, preset, robot], strict=True):
        args = resolved(m, "--env", f"{robot}-{kind}", "--preset", preset)
        assert (args.horizon, args.penalty_coef if m is mopo else args.beta) == row, kind
