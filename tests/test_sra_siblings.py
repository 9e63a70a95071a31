"""SRA with IQL, TD3+BC, AWAC and SAC-N: what they share; updates of the last three by hand; runs, cut and resumed."""

import ast
import gc
import importlib
import json
import math
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import test_sra_iql as base
import torch
from test_sra_iql import agent, batch, copied, here, log_prob_of, metrics, moved, parameters, resolved

from utils import UserError, load_dataset, load_expert, unpack

seed, data_file = base.seed, base.data_file  # fixtures
iql, td3bc, awac, sacn = (importlib.import_module(f"sra_{name}") for name in ("iql", "td3bc", "awac", "sacn"))
# script -> class of the learner, its networks that are trained, settings of a small one that IQL lacks
SCRIPTS = {
    iql: (iql.IQL, ("policy", "vf", "qf"), {}),
    td3bc: (td3bc.TD3BC, ("policy", "confidence", "qf"), {}),
    awac: (awac.AWAC, ("policy", "qf"), {"temperature": 0.5}),
    sacn: (sacn.SACN, ("policy", "qf", "log_alpha"), {"num_critics": 3}),
}


@pytest.fixture(params=SCRIPTS, ids=lambda m: m.__name__)
def m(request):
    return request.param


def small(m, **changes):
    return agent(SCRIPTS[m][0], m.Args(**base.LEARNER, **SCRIPTS[m][2]), **changes)


def gradients(loss, network):
    return torch.autograd.grad(loss, list(network.parameters()), retain_graph=True)


# --- what is shared ---


def test_siblings_differ_in_the_learner_only(m):
    """The blocks beside: test_shared_blocks.py."""

    def parts(script):
        source, learner = Path(script.__file__).read_text(), SCRIPTS[script][0].__name__
        body = {n.name: ast.get_source_segment(source, n) for n in ast.parse(source).body if hasattr(n, "name")}
        args = body["Args"].partition("# --- learner")[0].splitlines()  # no flag above the learner's differs
        names = [x for x in body if x not in (learner, "expectile_loss")]
        doc = source[source.index("Half of each batch") : source.index("what is kept.")]
        return names, [x for x in args if "exp_name" not in x], doc, body["main"].replace(f" {learner}(", " IQL(")

    assert parts(m) == parts(iql)


def test_settings_and_names_are_sras_but_for_the_learners_own(m):
    envs = [f"{robot}-medium" for robot in ("hopper", "halfcheetah", "walker2d", "ant")]
    for env in ("maze2d-umaze", "maze2d-large-dense", *envs):
        a, b = vars(resolved(env, m)), vars(resolved(env))
        assert not [k for k in a.keys() & b.keys() - {"exp_name"} if a[k] != b[k]]
    for name, values in (("temperature", [0.1, 0.3333, 0.3333, 0.3333, 1.0]), ("num_critics", [25, 500, 10, 20, 10])):
        if hasattr(m.Args, name):
            assert [getattr(resolved(env, m), name) for env in ("maze2d-umaze", *envs)] == values
    assert [resolved(f"hopper-medium-{x}", sacn).num_critics for x in ("expert", "replay")] == [200, 200]
    name, base = m.__name__, m.__name__.replace("sra", "uds")
    names = [resolved("maze2d-umaze", m, **x).exp_name for x in ({}, {"model_ratio": 0.0}, {"exp_name": "a"})]
    assert names == [name, base, "a"]
    wrong = {"temperature": 0.0, "num_critics": 0, "policy_delay": 0, "policy_noise": -0.1, "batch_size": 511}
    for name in wrong.keys() & vars(m.Args()).keys():
        with pytest.raises(UserError, match=f"--{name.replace('_', '-')} "):
            resolved("maze2d-umaze", m, **{name: wrong[name]})


def test_every_optimizer_moves_its_own_parameters(m):
    names, rows = SCRIPTS[m][1], batch()
    for frozen in names:
        a = small(m)
        a.set_rates = lambda step: None
        getattr(a, f"{frozen.removeprefix('log_')}_opt").param_groups[0]["lr"] = 0.0
        before = parameters(a, *names)
        out = a.update(*rows, 2)
        assert moved(before, a) == set(names) - {frozen} and not any(v.requires_grad for v in out.values())
        assert {"losses/critic", "losses/policy", "losses/clone", "q/expert", "q/others"} <= out.keys()
    assert not any(p.requires_grad for k in a.parts if "target" in k for p in a.parts[k].parameters())
    saved = {id(x) for x in a.parts.values()}  # is all that is learnt
    assert all(id(x) in saved for x in vars(a).values() if isinstance(x, torch.nn.Module | torch.optim.Optimizer))
    mean = a.policy((rows[0] - 5) / 2)  # acting is deterministic, on states as the environment shows them
    torch.testing.assert_close(copied(a).act(rows[0]), mean if m is td3bc else mean[0].tanh())


def test_the_clone_is_of_the_expert_half_with_weight_1(m):
    a, (obs, act, *_) = small(m), batch()
    extra = {iql: (torch.ones(12),), sacn: (torch.tensor(0.5),)}.get(m, ())
    by_hand = (a.policy(obs) - act)[:6].square().mean() if m is td3bc else -log_prob_of(*a.policy(obs), act)[:6].mean()
    losses = []
    for x in (a, copied(a, bc_weight=0.0)):
        torch.manual_seed(1)
        loss, stats = x.policy_loss(obs, act, *extra)
        losses.append(loss)
        torch.testing.assert_close(stats["losses/clone"], by_hand, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(losses[0] - losses[1], by_hand, rtol=1e-3, atol=1e-3)


def test_learning_rates_follow_the_codes_scheduler_and_its_drop(m):
    """The code steps a cosine multiplicatively; half-way it writes a tenth of the policy's rate into all optimizers."""
    a = small(m, cosine_updates=50, learning_rate_drop=10)
    policy, q = (torch.optim.SGD([torch.zeros(1)], lr=1e-3) for _ in range(2))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(policy, 50)
    small(m).set_rates(10**6)  # no cosine, no drop: no division by 0
    for step in range(20):
        if step == 10:
            policy.param_groups[0]["lr"] /= 10
            q.param_groups[0]["lr"] = policy.param_groups[0]["lr"]
        a.set_rates(step + 1)
        for name in [k for k in vars(a) if k.endswith("_opt")]:
            expected = (q if name in ("vf_opt", "qf_opt") else policy).param_groups[0]["lr"]
            assert getattr(a, name).param_groups[0]["lr"] == pytest.approx(expected)
        policy.step()
        scheduler.step()


def test_bfloat16_is_close_update_after_update(m, monkeypatch):
    """Every loss is computed twice, with bfloat16 copies of weights made anew: a stale one would change gradients."""
    full = small(m, hidden=(16, 16, 16), learning_rate=0.01)
    half = copied(full, bf16=True)
    learnt = [p for name in SCRIPTS[m][1] for p in getattr(half, name).parameters()]

    def twice(loss, *args):
        state, losses = torch.get_rng_state(), []
        for cached in (False, True):
            torch.set_autocast_cache_enabled(cached)
            torch.set_rng_state(state)
            losses.append(loss(*args))
        found = [x[0] if isinstance(x, tuple) else x for x in losses]
        found = [torch.autograd.grad(x, learnt, retain_graph=True, allow_unused=True) for x in found]
        assert all(x is y is None or x.equal(y) for x, y in zip(*found, strict=True))
        return losses[1]

    for name in [k for k in vars(type(half)) if k.endswith("_loss")]:
        monkeypatch.setattr(half, name, partial(twice, getattr(half, name)))
    rows = batch(12)
    for step in (1, 2, 3, 4):
        out = []
        for a in (full, half):
            torch.manual_seed(step)
            out.append(torch.stack(list(a.update(*rows, step).values())))
        torch.testing.assert_close(*out, rtol=0.05, atol=0.05)
        assert (out[0] != out[1]).any() and out[1].dtype == torch.float32
    with half.autocast():
        q, near = half.qf(*rows[:2]), half.qf(torch.tensor([[9.0] * 4, [9.01] * 4]), torch.zeros(2, 2))
    assert (q != q.bfloat16()).any() and (near[:, 0] != near[:, 1]).any()  # neither last nor first layer is rounded


# --- AWAC ---


def test_awac_losses_by_hand_and_a_terminal_row_does_not_bootstrap():
    a, (obs, act, rew, next_obs, terminated) = small(awac), batch()
    terminated[3] = 1
    torch.manual_seed(1)
    critic_loss, stats = a.critic_loss(obs, act, rew, next_obs, terminated)
    policy_loss, more = a.policy_loss(obs, act)
    torch.manual_seed(1)
    pi = [(mean + log_std.exp() * torch.randn(12, 2)).tanh() for mean, log_std in map(a.policy, (next_obs, obs))]
    target = rew + 0.99 * (1 - terminated) * a.target_qf(next_obs, pi[0]).amin(0)
    q, log_prob = a.qf(obs, act), log_prob_of(*a.policy(obs), act)
    torch.testing.assert_close(critic_loss, ((q[0] - target).square().mean() + (q[1] - target).square().mean()) / 2)
    assert stats["q/largest"] == q.max() and stats["q/largest_target"] == target.max()
    weight = ((q.amin(0) - a.qf(obs, pi[1]).amin(0)) / 0.5).exp().detach()
    expected = -log_prob[:6].mean() - (weight * log_prob).mean()
    torch.testing.assert_close(policy_loss, expected, rtol=1e-4, atol=1e-4)
    for x, y in zip(gradients(policy_loss, a.policy), gradients(expected, a.policy), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3)  # the weights are numbers
    policy_loss.backward()
    assert all(p.grad is None for p in [*a.qf.parameters(), *a.target_qf.parameters()])
    a.qf.forward = lambda o, x: torch.full((2, 12), 100.0 * (x is act))  # far better than the policy
    assert a.policy_loss(obs, act)[1]["q/weight"] == 100 != more["q/weight"]


def test_awac_updates_critics_then_policy():
    a, rows = small(awac, weight_decay=5e-3, learning_rate=0.05), batch()
    b = copied(a)
    qf_opt, policy_opt = base.adam(b.qf, b.policy)
    torch.manual_seed(1)
    for _ in range(3):
        awac.descend(qf_opt, b.critic_loss(*rows)[0])
        awac.descend(policy_opt, b.policy_loss(*rows[:2])[0])
        base.follow(b.target_qf, b.qf)
    torch.manual_seed(1)
    for step in (1, 2, 3):
        a.update(*rows, step)
    base.assert_close(a, b, "policy", "qf", "target_qf")


# --- TD3+BC ---


def test_td3bc_weight_of_q_is_a_number_without_gradient():
    a, (obs, act, *_) = small(td3bc, alpha=5.0), batch()
    loss, _ = a.policy_loss(obs, act)
    pi_act = a.policy(obs)
    q, error = a.qf(obs, pi_act)[0], (pi_act - act).square()
    expected = -5 / q.abs().mean().item() * q.mean() + error.mean() + error[:6].mean()  # the expert rows again
    torch.testing.assert_close(loss, expected)
    for x, y in zip(gradients(loss, a.policy), gradients(expected, a.policy), strict=True):
        torch.testing.assert_close(x, y)  # a gradient through mean |Q| would leave next to nothing of Q's


def test_td3bc_targets_have_clipped_noise_on_clipped_actions():
    a, (obs, act, rew, next_obs, terminated), seen = small(td3bc, noise_clip=0.15), batch(), []
    terminated[3], plain = 1, a.target_qf.forward
    a.target_qf.forward = lambda o, x: seen.append(x) or plain(o, x)
    torch.manual_seed(1)
    loss, stats = a.critic_loss(obs, act, rew, next_obs, terminated)
    torch.manual_seed(1)
    noise = (0.2 * torch.randn(12, 2)).clamp(-0.15, 0.15)
    assert (noise.abs() == 0.15).any() and (noise.abs() < 0.15).any()
    torch.testing.assert_close(seen[0], (a.target_policy(next_obs) + noise).clamp(-1, 1))
    target, q = rew + 0.99 * (1 - terminated) * plain(next_obs, seen[0]).amin(0), a.qf(obs, act)
    torch.testing.assert_close(loss, ((q[0] - target).square().mean() + (q[1] - target).square().mean()) / 2)
    a.args = replace(a.args, policy_noise=1000.0, noise_clip=5.0)
    a.critic_loss(obs, act, rew, next_obs, terminated)
    assert stats["q/largest"] == q.max() and (seen[1].abs() == 1).all()


def test_td3bc_updates_policy_and_targets_every_so_many_times():
    a, rows = small(td3bc, weight_decay=5e-3, learning_rate=0.05, policy_delay=3), batch()
    b, slow = copied(a), ("policy", "target_policy", "target_qf")
    qf_opt, policy_opt, confidence_opt = base.adam(b.qf, b.policy, b.confidence)
    for step in range(1, 7):
        before = parameters(a, *slow)
        torch.manual_seed(step)
        out = a.update(*rows, step)
        torch.manual_seed(step)
        td3bc.descend(qf_opt, b.critic_loss(*rows)[0])
        td3bc.descend(confidence_opt, -log_prob_of(*b.confidence(rows[0]), rows[1])[:6].mean())  # a clone of experts
        if step % 3 == 0:
            td3bc.descend(policy_opt, b.policy_loss(*rows[:2])[0])
            base.follow(b.target_qf, b.qf)
            base.follow(b.target_policy, b.policy)
        assert moved(before, a) == (set() if step % 3 else set(slow)) and ("losses/policy" in out) == (step % 3 == 0)
    base.assert_close(a, b, *slow, "qf", "confidence", tolerance=1e-4)
    c = copied(a)
    c.confidence.net[-1].bias.data += 1.0
    for x in (a, c):
        torch.manual_seed(1)
        x.update(*rows, 9)
    assert moved(parameters(a, *slow, "qf", "confidence"), c) == {"confidence"}  # which serves nothing else


# --- SAC-N ---


def separate(qf):
    """The Q functions of the ensemble as networks, one by one."""
    for e in range(qf.num_critics):
        one = sacn.mlp(qf.weight[0].shape[1], *(w.shape[2] for w in qf.weight))
        for layer, w, b in zip(one[::2], qf.weight, qf.bias, strict=True):
            layer.weight.data, layer.bias.data = w[e].T.detach().clone(), b[e, 0].detach().clone()
        yield one


@pytest.mark.parametrize("n, backup_entropy, target_entropy", [(2, True, None), (3, False, -1.0)])
def test_sacn_with_two_critics_is_sac(n, backup_entropy, target_entropy):
    """Haarnoja et al. with networks, targets and optimizers of their own; and with more, whose smallest counts."""
    changes = dict(num_critics=n, backup_entropy=backup_entropy, target_entropy=target_entropy)
    changes |= dict(bc_weight=0.0, weight_decay=5e-3, learning_rate=0.05)
    a, (obs, act, rew, next_obs, terminated) = small(sacn, **changes), batch()
    terminated[3], policy, log_alpha = 1, deepcopy(a.policy), torch.zeros((), requires_grad=True)
    q, slow = list(separate(a.qf)), list(separate(a.target_qf))
    (policy_opt, *q_opts), alpha_opt = base.adam(policy, *q), torch.optim.Adam([log_alpha], lr=0.05)

    def sample(s):
        mean, log_std = policy(s)
        u = mean + log_std.exp() * torch.randn(12, 2)
        density = torch.distributions.Normal(mean, log_std.exp()).log_prob(u) - (1 - u.tanh() ** 2).log()
        return u.tanh(), density.sum(1)

    def smallest(networks, s, x):
        return torch.stack([f(torch.cat([s, x], 1)).squeeze(1) for f in networks]).amin(0)

    torch.manual_seed(1)
    for _ in range(3):
        log_prob = sample(obs)[1].detach()
        sacn.descend(alpha_opt, -(log_alpha * (log_prob + (target_entropy or -2))).mean())  # of 2 dimensions
        alpha = log_alpha.exp().item()
        x, log_prob = sample(obs)
        sacn.descend(policy_opt, (alpha * log_prob - smallest(q, obs, x)).mean())
        with torch.no_grad():
            x, log_prob = sample(next_obs)
            target = rew + 0.99 * (1 - terminated) * (smallest(slow, next_obs, x) - backup_entropy * alpha * log_prob)
        for f, opt, g in zip(q, q_opts, slow, strict=True):
            sacn.descend(opt, 0.5 * (f(torch.cat([obs, act], 1)).squeeze(1) - target).square().mean())
            base.follow(g.requires_grad_(False), f)
    torch.manual_seed(1)
    for step in (1, 2, 3):
        out = a.update(obs, act, rew, next_obs, terminated, step)
    assert out["q/alpha"].item() == pytest.approx(log_alpha.exp().item(), rel=1e-4)
    mine, theirs = [a.policy, *separate(a.qf), *separate(a.target_qf)], [policy, *q, *slow]
    for x, y in zip(mine, theirs, strict=True):
        for p, r in zip(x.parameters(), y.parameters(), strict=True):
            torch.testing.assert_close(p, r, atol=1e-3, rtol=1e-3)


# --- runs ---


def leaves(x, path=""):
    if isinstance(x, torch.Tensor):
        return {path: x}
    items = x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list | tuple) else ()
    return {k: v for name, y in items for k, v in leaves(y, f"{path}/{name}").items()}


def saved(folder, *names):
    """Tensors of checkpoints by path, random states left out."""
    names = names or sorted(p.stem for p in folder.glob("*.pt"))
    state = leaves({name: torch.load(folder / f"{name}.pt", weights_only=True) for name in names})
    return {k: v for k, v in state.items() if "/rng/" not in k}


def assert_same(x, y):
    assert x.keys() == y.keys() and len(x) > 30 and not [k for k in x if not x[k].equal(y[k])]


def test_a_run_cut_in_every_phase_equals_a_run_left_alone(m, data_file, tmp_path, monkeypatch):
    whole, plain = here(data_file, tmp_path / "whole", script=m), m.Run.log
    config, result = (json.loads((whole / f"{n}.json").read_text()) for n in ("config", "result"))
    assert config["args"]["rollout_rows"] == 1000 and config["args"]["learning_rate"] == 1e-4  # resolved values
    assert result["algorithm"] == m.__name__ and math.isfinite(result["normalized_score"])
    assert result["dataset"]["expert"].items() >= {"id": "small", "transitions": 5 * 49 + 2, "trajectories": 5}.items()
    rounds = [0, 15, 30, 45]
    expected = {"eval/return": [30, 60], "losses/policy": [10, 20, 30, 40, 50, 60], "model/epoch": 4 * [0]}
    for key, updates in (expected | {"model/goals": rounds, "model/distance_to_expert": rounds}).items():
        assert [r["update"] for r in metrics(whole) if key in r] == updates
    state = torch.load(whole / "agent.pt", weights_only=True)
    assert [step for step, _ in state["imagined"]["rounds"]] == rounds
    assert (whole / "agent.pt").stat().st_size < 1_000_000  # policies of the rounds, not their rows

    for place in ({"model/epoch": 3}, {"model/rollout_policy_update": 50}, {"update": 30}, {"update": 50}):

        def log(self, update, row, place=place):
            plain(self, update, row)
            if {"update": update, **row}.items() >= place.items() and any(k.startswith("losses/") for k in row):
                raise KeyboardInterrupt

        monkeypatch.setattr(m.Run, "log", log)
        with pytest.raises(KeyboardInterrupt):
            here(data_file, tmp_path / "cut", script=m)
        gc.collect()  # closes the log, which is locked
    monkeypatch.setattr(m.Run, "log", plain)
    again = here(data_file, tmp_path / "cut", script=m)
    assert_same(saved(whole), saved(again))
    assert metrics(again) == metrics(whole)


def test_what_makes_it_another_run_and_another_model(data_file, tmp_path):
    whole = here(data_file, tmp_path)
    for flag, value in (("--expert-trajectories", "4"), ("--total-updates", "90")):
        with pytest.raises(UserError, match=flag):  # rates and rounds depend on the updates
            here(data_file, tmp_path, flag, value)
    flags = ("--dynamics-from", str(whole / "dynamics.pt"), "--exp-name", "borrowed")
    folder = here(data_file, tmp_path, *flags)
    assert not any("model/epoch" in row for row in metrics(folder))
    assert_same(saved(whole, "agent"), saved(folder, "agent"))
    with pytest.raises(UserError, match="differs in data"):  # it has seen other demonstrations
        here(data_file, tmp_path / "other", *flags, "--expert-trajectories", "4")


def test_without_augmentation_it_is_the_learner_alone_bit_for_bit(m, data_file, tmp_path):
    """eta = 0 and the learner alone, fed from both datasets, are the same; with a warm-up until its end."""
    flags, bare = ("--eval-episodes", "0"), base.without_rewards(data_file, tmp_path / data_file.name)
    control, late = (here(bare, tmp_path, *flags, *x, script=m) for x in (("--model-ratio", "0"), ("--warmup", "30")))
    logged, after = ([row for row in metrics(x) if "losses/policy" in row] for x in (control, late))
    assert m.__name__.replace("sra", "uds") in control.name and len(metrics(control)) == len(logged)  # no round
    assert logged[:3] == after[:3] and logged[3] != after[3]
    args = m.resolve(base.arguments(m, bare, tmp_path, "--model-ratio", "0"), base.HOPPER)
    data = load_dataset(base.HOPPER, str(data_file))
    expert = load_expert(base.HOPPER, str(data_file), 5, data)
    normalizer = m.Normalizer(torch.cat([d.obs[m.usable(d)] for d in (expert, data)]))
    torch.manual_seed(3)
    alone = SCRIPTS[m][0](normalizer, 11, 3, args, base.CPU)
    rows = [m.labelled(d, label, normalizer, base.CPU) for d, label in ((expert, 1.0), (data, 0.0))]
    for step in range(1, 61):
        alone.update(*unpack(torch.cat([x[torch.randint(len(x), (10,))] for x in rows]), 11, 3), step)
    assert_same(saved(control, "agent"), leaves({"agent": {k: part.state_dict() for k, part in alone.parts.items()}}))
