"""MOPO's two tasks whose reward differs from that of the agent that collected the data."""

import gymnasium
import numpy as np


def relabelled_reward(kind, act, next_obs):
    """Rewards of MOPO's tasks with a running agent's data; act (..., A), next_obs (..., O) -> (...).

    run   (halfcheetah)  min(v_x, 3) - 0.1 |a|^2, the training reward of the agent that collected jump's data
    jump  (halfcheetah)  min(v_x, 3) + 15 z - 0.1 |a|^2 (z: height above the nominal pose)
    angle (ant)          1 + v_x cos 30° + v_y sin 30° - 0.5 |a|^2: run, but 30 degrees to the left

    Speed limit, factor and costs: gwthomas/force, env/mujoco (by one of MOPO's authors); direction: MOPO's slides.
    Ours: velocities (m/s) and heights (m) are those after the step, not means over it; z is relative to the nominal
    pose (there: to the height at reset, which observations do not contain; this shifts returns by some 900); the ant
    gets 1 per step alive, as in Ant-v4, and no contact cost (sources differ).
    """
    cost = (act**2).sum(-1)
    if kind in ("run", "jump"):
        return next_obs[..., 8].clip(max=3) + (15 * next_obs[..., 0] if kind == "jump" else 0) - 0.1 * cost
    return 1 + np.cos(np.pi / 6) * next_obs[..., 13] + np.sin(np.pi / 6) * next_obs[..., 14] - 0.5 * cost


class Relabelled(gymnasium.Wrapper):
    """A robot with the reward of another task."""

    def __init__(self, env, kind):
        super().__init__(env)
        self.kind = kind

    def step(self, action):
        obs, _, terminated, truncated, info = self.env.step(action)
        return obs, float(relabelled_reward(self.kind, np.asarray(action), obs)), terminated, truncated, info
