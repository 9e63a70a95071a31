"""Top views of mazes: the data, what models imagine and what policies execute (ROMI Sec. 4.5, Figure 3); and how
accurate the models are (as asked in ROMI's Appendix C, with our own measures).

  discrepancy   D(D, tau) = 1/(H+1) sum_t min_(s in D) |s_t - s|_2                                       ROMI Eq. 5
  accuracy      on held-out rows of the data; for imagined transitions, against the true simulator

A state is the whole observation: (x, y, vx, vy) in m and m/s, or an ant's 29 numbers. A reverse model predicts s from
s', a forward model s' from s. Held-out rows are compared with predicted means; imagined transitions are sampled, from
start states drawn uniformly, and no rollout ends early. Everything is seeded.
"""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import tyro
from pydantic import TypeAdapter
from scipy.spatial import cKDTree

from benchmark.report import FIGURES, RESULTS
from utils import WORLDS, UserError, load_dataset, make_env, normalized_score, parse_task, rollout

sys.path.append(str(Path(__file__).resolve().parents[1] / "algorithms"))


def discrepancy(tree, trajectories):
    """Eq. 5 for each trajectory, arrays (T, O): (len(trajectories),). `tree`: a cKDTree of the data."""
    nearest = tree.query(np.concatenate(trajectories), workers=-1)[0]
    lengths = np.array([len(t) for t in trajectories])
    return np.add.reduceat(nearest, np.cumsum(lengths) - lengths) / lengths


def mean_se(values):
    """Mean and standard error (None for a single value)."""
    return [float(np.mean(values)), float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else None]


def held_out(data, args):
    """Row numbers (R,) held out by train_dynamics, from the same random split. They selected each member's best epoch
    and the elites, so errors on them are a little too small."""
    known = data.has_next.nonzero().squeeze(1)
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(args.seed))
    return known[order[: max(1, min(int(args.holdout_ratio * len(known)), args.holdout_max))]]


@torch.no_grad()
def accuracy(dynamics, data, rows, reverse):
    """Root mean squares over rows (R,) and elites: distance of predicted to recorded state, and reward error."""
    given, wanted = (data.next_obs[rows], data.obs[rows]) if reverse else (data.obs[rows], data.next_obs[rows])
    x = dynamics.inputs(given, data.act[rows]).expand(len(dynamics.elites), -1, -1)
    mean, _ = dynamics(x, dynamics.elites)  # (E, R, 1+O): reward and change of state
    errors = {"state": (given + mean[..., 1:] - wanted).norm(dim=-1), "reward": mean[..., 0] - data.rew[rows]}
    return {f"rmse_{k}": v.double().square().mean().sqrt().item() for k, v in errors.items()} | {"rows": len(rows)}


class FinishedRun:
    """A run's folder, which the script's functions use as a Run with all phases done: they load instead of train."""

    def __init__(self, folder):
        try:
            self.folder, self.config = folder, json.loads((folder / "config.json").read_text())
            self.script = importlib.import_module(Path(self.config["script"]).stem)
            self.args = TypeAdapter(self.script.Args).validate_python(self.config["args"])
            self.task = parse_task(self.config["task"])
        except (OSError, ValueError, KeyError, ImportError) as e:
            raise UserError(f"{folder} is no run of these scripts ({type(e).__name__}: {e})") from None
        if self.task.domain not in WORLDS or self.script.__name__ not in ("romi_bcq", "fomi_bcq"):
            raise UserError(f"{folder}: case studies need runs of romi_bcq.py or fomi_bcq.py on maze2d or antmaze")
        self.world = WORLDS[self.task.domain]
        self.label, self.reverse = f"{self.args.exp_name} {self.args.seed}", self.script.__name__ == "romi_bcq"
        self.dynamics, self.maze = None, self.task.kind.split("-")[0]

    def steps(self, phase, total=None, every=None, **parts):
        """Restore a phase, if need be from the run that lent it; returns no steps."""
        file, lent = self.folder / f"{phase}.pt", getattr(self.args, f"{phase}_from", None)
        file = Path(lent) if lent and not file.exists() else file
        if not file.exists():
            raise UserError(f"{file} does not exist; has the run reached this phase?")
        state = torch.load(file, map_location="cpu", weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        self.step = state["step"]
        return ()

    def load(self, data):
        m, dims = self.script, (data.obs.shape[1], data.act.shape[1])
        if self.args.model_ratio > 0:
            self.dynamics = m.Dynamics(*dims, self.args)
            self.steps("dynamics", dynamics=self.dynamics)
            cond, known = data.next_obs if self.reverse else data.obs, data.has_next
            self.rollout_policy = m.train_rollout_policy(cond[known], data.act[known], self.args, self)
        self.agent = m.BCQ(*dims, self.args, torch.device("cpu"))
        self.steps("agent", **self.agent.parts)

    def imagine(self, data, n, seed):
        """At most 500 rollouts in forward time: obs, act, next_obs, float64 arrays (n, h, ...)."""
        torch.manual_seed(seed)  # start states are sampled first, so runs that sample alike share them
        args = replace(self.args, rollout_batch_size=n, model_buffer_size=n * self.args.horizon)
        never = lambda obs, act, next_obs: torch.zeros(len(obs), dtype=torch.bool)  # noqa: E731
        starts = self.script.row_sampler(data.obs)
        _, chains = self.script.imagine(starts, self.dynamics, self.rollout_policy, never, args)
        chains = chains[::-1] if self.reverse else chains
        return [torch.stack(x, 1).double().numpy() for x in zip(*chains, strict=True)]


def study(run, data, tree, episodes, chains, seed):
    """All numbers of a run, and lists of imagined and of executed trajectories."""
    run.load(data)
    out = {"folder": run.folder.name, "algorithm": run.args.exp_name, "seed": run.args.seed, "updates": run.step}
    imagined = []
    if run.dynamics:
        out["held_out"] = {"1": accuracy(run.dynamics, data, held_out(data, run.args), run.reverse)}
        obs, act, next_obs = run.imagine(data, chains, seed)
        imagined = list(np.concatenate([obs[:, :1], next_obs], 1))
        one, all_steps = run.world.replay_error(run.maze, obs, act, next_obs)
        out["imagined"] = {"trajectories": len(imagined), "horizon": run.args.horizon, "replay_error_1": one}
        out["imagined"] |= {"replay_error_h": all_steps, "discrepancy": mean_se(discrepancy(tree, imagined))}
    # seeds apart from those of evaluations in training, 1000 seed + 100
    executed, rewards = rollout([make_env(run.task) for _ in range(episodes)], run.agent.act, 1_000_000 * (1 + seed))
    returns = [float(r.sum()) for r in rewards]
    out["executed"] = {"trajectories": episodes, "return": mean_se(returns)}
    out["executed"]["score"] = mean_se([normalized_score(run.task, r) for r in returns])
    out["executed"]["discrepancy"] = mean_se(discrepancy(tree, executed))
    return out, imagined, executed


def draw(path, run, panels, results):
    """panels: (title, trajectories), a top view each; bars of the discrepancies fill the last row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(4, len(panels) + 1)
    lines = len(panels) // columns + 1
    figure = plt.figure(figsize=(3.4 * columns, 3.6 * lines), layout="constrained")
    grid = figure.add_gridspec(lines, columns)
    for i, (title, trajectories) in enumerate(panels):
        axes = figure.add_subplot(grid[i // columns, i % columns])
        axes.imshow(run.world.view_trajectories(run.maze, trajectories, 160))
        axes.set_title(title, fontsize=9)
        axes.axis("off")
    axes = figure.add_subplot(grid[-1, len(panels) % columns :])
    for k, what in enumerate(("imagined", "executed")):
        for i, (mean, error) in ((i, r[what]["discrepancy"]) for i, r in enumerate(results.values()) if what in r):
            axes.bar(i + 0.4 * k - 0.2, mean, 0.38, yerr=error or 0, color=f"C{k}", capsize=3)
    axes.set_xticks(range(len(results)), results, fontsize=8)
    axes.set_title("discrepancy (Eq. 5), blue: imagined, orange: executed", fontsize=9)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)


def case_study(
    runs: tyro.conf.Positional[tuple[Path, ...]],
    dataset: str = "",
    out: Path | None = None,
    episodes: int = 100,
    chains: int = 500,
    seed: int = 0,
):
    """Data, imagined and executed trajectories of maze runs side by side (ROMI's Figure 3).

    Args:
        runs: folders of romi_bcq.py and fomi_bcq.py, with or without model, on one task and dataset
        dataset: --dataset of the scripts, if the file has moved since the runs
        out: folder for figure and numbers; default: benchmark/figures and benchmark/results
        episodes: per policy
        chains: rollouts per model, at most 500
    """
    if not runs or episodes < 1 or not 1 <= chains <= 500:
        raise UserError("give the folders of runs, at least one episode and 1 to 500 chains")
    finished = [FinishedRun(folder) for folder in runs]
    first, dataset = finished[0], dataset or finished[0].args.dataset
    data = load_dataset(first.task, dataset)
    if {(run.task.id, run.config["dataset"]["sha256"]) for run in finished} != {(first.task.id, data.sha256)}:
        raise UserError(f"{', '.join(map(str, runs))}: not all are runs on {first.task.id} with --dataset {dataset}")
    states, trajectory, rng = data.obs.double().numpy(), data.trajectory.numpy(), np.random.default_rng(seed)
    tree = cKDTree(states, balanced_tree=False)
    some = np.unique(trajectory[rng.choice(len(trajectory), 100)])  # of rows: most of antmaze's trajectories have one
    dreams, deeds, results = [], [], {}
    for run in finished:
        results[run.label], imagined, executed = study(run, data, tree, episodes, chains, seed)
        dreams += [(f"{run.label}: imagined", imagined)] if imagined else []
        score = results[run.label]["executed"]["score"][0]
        deeds.append((f"{run.label}: executed, score {score:.1f}", executed))
        print(deeds[-1][0], file=sys.stderr)
    recorded = [states[a:b] for a, b in np.searchsorted(trajectory, [some, some + 1]).T]
    task, _, _, *source = first.folder.name.split("__")
    name = "__".join([f"case_study_{task}", *source])
    picture, numbers = (out or FIGURES) / f"{name}.png", (out or RESULTS) / f"{name}.json"
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw(picture, first, [("data", recorded), *dreams, *deeds], results)
    facts = {"task": first.task.id, "episodes": episodes, "chains": chains, "seed": seed, "data": data.facts()}
    numbers.write_text(json.dumps(facts | {"runs": results}, indent=1) + "\n")
    print(f"{picture}\n{numbers}")
