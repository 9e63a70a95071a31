"""D4RL's AntMaze on today's MuJoCo: a four-legged robot in a maze of 4 m cells.

    import gymnasium, envs.antmaze   # the import registers Rewind/AntMaze-<task>-v2 for the six tasks in TASKS
    env = gymnasium.make("Rewind/AntMaze-medium-play-v2", render_mode="rgb_array")

The model has D4RL's parameters (Farama-Foundation/D4RL, d4rl/locomotion): an environment step is five physics steps of
0.02 s (RK4), an action of 1 a torque of 30. Its median one-step error against MuJoCo 2.2.0 is 1e-15 on 2.3.7 and 1e-4
on 4.0.0. Gymnasium-Robotics' AntMaze has a different robot, a different time step and mirrored mazes.

Observation: x, y, z, quaternion, 8 joint angles, then their 14 velocities, but not the goal. The cell in row r and
column c of a map is centred at x = 4 (c - 1), y = 4 (r - 1): the start R is the origin. At each reset a goal is
sampled, as in D4RL's v2: the centre of G plus U(0, 1) + U(0, 0.5) on each axis. A step that ends within 0.5 of
it gets reward 1 and ends the episode. Tasks in the same maze differ only in their data.
"""

import gymnasium
import mujoco
import numpy as np

from envs.maze2d import draw_lines, replay

MAZES = {
    "umaze": ["#####", "#R..#", "###.#", "#G..#", "#####"],
    "medium": ["########", "#R.##..#", "#..#...#", "##...###", "#..#...#", "#.#..#.#", "#...#.G#", "########"],
    "large": [
        "############",
        "#R...#.....#",
        "#.##.#.#.#.#",
        "#......#...#",
        "#.####.###.#",
        "#..#.#.....#",
        "##.#.#.#.###",
        "#..#...#.G.#",
        "############",
    ],
}
MAX_STEPS = {"umaze": 700, "medium": 1000, "large": 1000}
TASKS = ("umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play", "large-diverse")
CELL = 4.0  # m
RADIUS = 0.5  # m, of a goal


def free_cells(maze):
    """(row, column) of every cell without a wall."""
    return [(r, c) for r, line in enumerate(MAZES[maze]) for c, cell in enumerate(line) if cell != "#"]


def goal_cell(maze):
    return next((r, line.index("G")) for r, line in enumerate(MAZES[maze]) if "G" in line)


def middle(cell):
    """(row, column) -> (x, y) in m"""
    return np.array([CELL * (cell[1] - 1), CELL * (cell[0] - 1)])


def sample_goal(cell, rng):
    return middle(cell) + rng.uniform(0, 1, 2) + rng.uniform(0, 0.5, 2)


def mujoco_model(maze):
    # Directions of the legs; axis and range of the ankles, whose sign sets which way they bend.
    legs = (
        (1, (1, 1), "-1 1 0", "30 70"),
        (2, (-1, 1), "1 1 0", "-70 -30"),
        (3, (-1, -1), "-1 1 0", "-70 -30"),
        (4, (1, -1), "1 1 0", "30 70"),
    )
    bodies = ""
    for i, (x, y), axis, bend in legs:
        capsule = f'<geom type="capsule" size="0.08" fromto="0 0 0 {0.2 * x} {0.2 * y} 0"/>'
        bodies += f"""
          <body>{capsule}
            <body pos="{0.2 * x} {0.2 * y} 0">
              <joint name="hip_{i}" axis="0 0 1" range="-30 30"/>{capsule}
              <body pos="{0.2 * x} {0.2 * y} 0">
                <joint name="ankle_{i}" axis="{axis}" range="{bend}"/>
                <geom type="capsule" size="0.08" fromto="0 0 0 {0.4 * x} {0.4 * y} 0"/>
              </body>
            </body>
          </body>"""
    walls = "".join(
        f'<geom type="box" pos="{CELL * (c - 1)} {CELL * (r - 1)} 1" size="2 2 1" conaffinity="1"/>'
        for r, line in enumerate(MAZES[maze])
        for c, cell in enumerate(line)
        if cell == "#"
    )
    motors = "".join(
        f'<motor joint="{joint}_{i}" ctrllimited="true" ctrlrange="-30 30"/>'
        for i in (4, 1, 2, 3)  # D4RL's order of the actions
        for joint in ("hip", "ankle")
    )
    model = mujoco.MjModel.from_xml_string(f"""
    <mujoco>
      <compiler inertiafromgeom="true" angle="degree"/>
      <option timestep="0.02" integrator="RK4"/>
      <default>
        <joint limited="true" armature="1" damping="1"/>
        <geom condim="3" contype="1" conaffinity="0" margin="0.01" friction="1 0.5 0.5" density="5"
              solref="0.02 1" solimp="0.8 0.8 0.01"/>
      </default>
      <worldbody>
        <geom type="plane" size="40 40 40" conaffinity="1"/>
        {walls}
        <body name="torso" pos="0 0 0.75">
          <joint type="free" limited="false" armature="0" damping="0" margin="0.01"/>
          <geom type="sphere" size="0.25"/>{bodies}
        </body>
      </worldbody>
      <actuator>{motors}</actuator>
    </mujoco>""")
    # Since MuJoCo 3.5 the margins of two geoms add up; before, the larger one counted.
    if tuple(int(n) for n in mujoco.__version__.split(".")[:2]) >= (3, 5):
        model.geom_margin[:] /= 2
    return model


class AntMaze(gymnasium.Env):
    """antmaze-*-v2 of D4RL: fixed start cell, a new goal at each reset, terminal when it is reached."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, maze="umaze", render_mode=None):
        self.maze, self.render_mode = maze, render_mode
        self.model = mujoco_model(maze)
        self.data = mujoco.MjData(self.model)
        self.goal = sample_goal(goal_cell(maze), np.random.default_rng(0))  # until the first reset
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (29,), np.float64)
        self.action_space = gymnasium.spaces.Box(-1, 1, (8,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.goal = sample_goal(goal_cell(self.maze), self.np_random)
        return self.start(self.np_random), {}

    def start(self, rng, position=None):
        """Reset with D4RL's noise, around the origin or with x, y exactly at `position`; returns the observation."""
        qpos = self.model.qpos0 + rng.uniform(-0.1, 0.1, 15)
        if position is not None:
            qpos[:2] = position
        return self.set_state(qpos, 0.1 * rng.normal(size=14))

    def set_state(self, qpos, qvel):
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[:], self.data.qvel[:] = qpos, qvel
        return self.observation()

    def observation(self):
        return np.concatenate([self.data.qpos, self.data.qvel])

    def step(self, action):
        self.data.ctrl[:] = 30 * np.clip(action, -1, 1)
        mujoco.mj_step(self.model, self.data, 5)
        obs = self.observation()
        reached = bool(np.linalg.norm(obs[:2] - self.goal) <= RADIUS)
        return obs, float(reached), reached, False, {}

    def render(self):
        """Top view, 80 pixels per cell, rows downwards: (height, width, 3) uint8"""
        image, draw, place = top_view(self.maze, 80)
        (x, y), r = place(self.goal), 80 * RADIUS / CELL
        draw.ellipse([x - r, y - r, x + r, y + r], "limegreen")
        shown = mujoco.MjData(self.model)  # a copy, so that rendering changes nothing
        shown.qpos[:] = self.data.qpos
        mujoco.mj_kinematics(self.model, shown)
        for i in np.flatnonzero(self.model.geom_bodyid)[::-1]:  # the torso last
            radius, half, *_ = self.model.geom_size[i]
            axis = shown.geom_xmat[i].reshape(3, 3)[:2, 2] * half
            ends = [place(shown.geom_xpos[i, :2] + way * axis) for way in (-1, 1)]
            draw.line(ends, "red", width=max(1, round(80 * 2 * radius / CELL)))
            if self.model.geom_type[i] == mujoco.mjtGeom.mjGEOM_SPHERE:
                (x, y), r = ends[0], 80 * radius / CELL
                draw.ellipse([x - r, y - r, x + r, y + r], "darkred")
        return np.asarray(image)


def top_view(maze, scale):
    """Image of a maze with its goal region, its ImageDraw, and a function from positions (x, y) to pixels."""
    from PIL import Image, ImageDraw

    lines = MAZES[maze]
    image = Image.new("RGB", (scale * len(lines[0]), scale * len(lines)), "white")
    draw = ImageDraw.Draw(image)
    for r, line in enumerate(lines):
        for c, cell in enumerate(line):
            if cell == "#":
                draw.rectangle([scale * c, scale * r, scale * (c + 1) - 1, scale * (r + 1) - 1], "gray")

    def place(position):
        return scale * (position[0] / CELL + 1.5), scale * (position[1] / CELL + 1.5)

    draw.rounded_rectangle(goal_region(maze, place), scale * RADIUS / CELL, "palegreen")
    return image, draw, place


def goal_region(maze, place):
    """Pixels (left, top, right, bottom) of all positions that some goal rewards."""
    x, y = middle(goal_cell(maze))
    return [*place((x - RADIUS, y - RADIUS)), *place((x + 1.5 + RADIUS, y + 1.5 + RADIUS))]


def view_trajectories(maze, trajectories, scale=80):
    """Top view with a line per trajectory, arrays (T, 29) in forward time, from blue (start) to red (end)."""
    image, draw, place = top_view(maze, scale)
    draw_lines(draw, place, trajectories, scale)
    region, radius = goal_region(maze, place), scale * RADIUS / CELL
    draw.rounded_rectangle(region, radius, outline="green", width=scale // 40)  # drawn last, so lines do not hide it
    return image


def replay_error(maze, obs, act, next_obs):
    """Replay imagined chains in the true simulator: obs, next_obs (C, h, 29), act (C, h, 8) in forward time.

    Returns two mean Euclidean distances between imagined and simulated state, over all 29 entries: after one step from
    each imagined state, and after all h steps from the first.
    """
    env = AntMaze(maze)

    def begin(o):
        return env.set_state(np.concatenate([o[:3], o[3:7] / max(np.linalg.norm(o[3:7]), 1e-9), o[7:15]]), o[15:])

    handler = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(lambda message: None)  # the simulation may explode in imagined states
    try:
        return replay(env, begin, obs, act, next_obs)
    finally:
        mujoco.set_mju_user_warning(handler)


for _task in TASKS:
    _maze = _task.split("-")[0]
    gymnasium.register(
        f"Rewind/AntMaze-{_task}-v2",
        entry_point="envs.antmaze:AntMaze",
        kwargs={"maze": _maze},
        max_episode_steps=MAX_STEPS[_maze],
    )
