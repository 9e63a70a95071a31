"""D4RL's maze2d on today's MuJoCo: a force-driven ball in a maze.

    import gymnasium, envs.maze2d    # the import registers Rewind/Maze2d-{umaze,medium,large}[-dense]-v1
    env = gymnasium.make("Rewind/Maze2d-umaze-v1", render_mode="rgb_array")

The model has D4RL's coordinates and parameters (Farama-Foundation/D4RL, d4rl/pointmaze), and two corrections for wall
contact on today's MuJoCo. In free motion a step equals, to 1e-15, the closed form

    c = clip(v, -5, 5),   v' = c + h (f a - d c) / (m + h d),   x' = x + h v'
    h = 0.01 s, f = 100 N, d = 1 N s/m (damping), m = 4.18879 kg

Observation: x (row direction), y (column direction) in m, their velocities in m/s; cell (i, j) is centred at
(i - 0.2, j - 0.2). The task never terminates. The reward depends on the state after the step: 1 within 0.5 of the goal,
or exp(-distance).
"""

import gymnasium
import mujoco
import numpy as np

MAZES = {
    "umaze": ["#####", "#G..#", "###.#", "#...#", "#####"],
    "medium": ["########", "#..##..#", "#..#...#", "##...###", "#..#...#", "#.#..#.#", "#...#.G#", "########"],
    "large": [
        "############",
        "#....#.....#",
        "#.##.#.#.#.#",
        "#......#...#",
        "#.####.###.#",
        "#..#.#.....#",
        "##.#.#.#.###",
        "#..#...#.G.#",
        "############",
    ],
}
MAX_STEPS = {"umaze": 300, "medium": 600, "large": 800}


def free_cells(maze):
    """(row, column) of every cell without a wall, including the goal's."""
    return [(i, j) for i, line in enumerate(MAZES[maze]) for j, cell in enumerate(line) if cell != "#"]


def goal_cell(maze):
    return next((i, line.index("G")) for i, line in enumerate(MAZES[maze]) if "G" in line)


def mujoco_model(maze):
    walls = "".join(
        f'<geom type="box" pos="{i + 1} {j + 1} 0" size="0.5 0.5 0.2"/>'
        for i, line in enumerate(MAZES[maze])
        for j, cell in enumerate(line)
        if cell == "#"
    )
    model = mujoco.MjModel.from_xml_string(f"""
    <mujoco>
      <compiler inertiafromgeom="true"/>
      <option timestep="0.01" gravity="0 0 0" iterations="20" integrator="Euler"/>
      <default>
        <joint damping="1" limited="false"/>
        <geom density="1000" condim="1" friction="0.5 0.1 0.1" margin="0.002" contype="2" conaffinity="1"/>
      </default>
      <worldbody>
        <geom type="plane" pos="0 0 -0.1" size="40 40 0.25" contype="1" conaffinity="0"/>
        <body name="ball" pos="1.2 1.2 0">
          <geom name="ball" type="sphere" size="0.1" contype="1"/>
          <joint name="x" type="slide" axis="1 0 0"/>
          <joint name="y" type="slide" axis="0 1 0"/>
        </body>
        {walls}
      </worldbody>
      <actuator>
        <motor joint="x" gear="100" ctrllimited="true" ctrlrange="-1 1"/>
        <motor joint="y" gear="100" ctrllimited="true" ctrlrange="-1 1"/>
      </actuator>
    </mujoco>""")
    # Since MuJoCo 3.5 the margins of two geoms add up; before, the larger one counted.
    ball = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_GEOM, "ball")
    model.geom_margin[:] = 0
    model.geom_margin[ball] = 0.002
    # MuJoCo 3.0 changed a sliding body's inverse weight, which scales contact softness, from 2/(3m) to 1/m.
    body = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_BODY, "ball")
    model.body_invweight0[body, 0] = 2 / (3 * model.body_mass[body])
    return model


class Maze2d(gymnasium.Env):
    """maze2d-{umaze,medium,large}{,-dense}-v1 of D4RL: fixed goal, random start, no termination."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 50}

    def __init__(self, maze="umaze", dense=False, render_mode=None):
        self.maze, self.dense, self.render_mode = maze, dense, render_mode
        self.model = mujoco_model(maze)
        self.data = mujoco.MjData(self.model)
        self.goal = np.array(goal_cell(maze), float)
        self.starts = np.array(free_cells(maze), float)
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (4,), np.float64)
        self.action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        cell = self.starts[self.np_random.integers(len(self.starts))]
        self.set_state(cell + self.np_random.uniform(-0.1, 0.1, 2), self.np_random.normal(0, 0.1, 2))
        return self.observation(), {}

    def set_state(self, position, velocity):
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[:], self.data.qvel[:] = position, velocity

    def observation(self):
        return np.concatenate([self.data.qpos, self.data.qvel])

    def reward(self, position):
        """position (..., 2) -> (...)"""
        distance = np.linalg.norm(position - self.goal, axis=-1)
        return np.exp(-distance) if self.dense else (distance <= 0.5).astype(float)

    def step(self, action):
        self.data.ctrl[:] = np.clip(action, -1, 1)
        np.clip(self.data.qvel, -5, 5, out=self.data.qvel)
        mujoco.mj_step(self.model, self.data)
        obs = self.observation()
        return obs, float(self.reward(obs[:2])), False, False, {}

    def render(self):
        """Top view, 40 pixels per cell, rows downwards: (height, width, 3) uint8"""
        image, draw, place = top_view(self.maze, 40)
        (y, x), r = place(self.data.qpos), 4
        draw.ellipse([y - r, x - r, y + r, x + r], "red")
        return np.asarray(image)


def top_view(maze, scale):
    """Image of a maze with its goal, its ImageDraw, and a function from observed positions (x, y) to pixels."""
    from PIL import Image, ImageDraw

    lines = MAZES[maze]
    image = Image.new("RGB", (scale * len(lines[0]), scale * len(lines)), "white")
    draw = ImageDraw.Draw(image)
    for i, line in enumerate(lines):
        for j, cell in enumerate(line):
            if cell == "#":
                draw.rectangle([scale * j, scale * i, scale * (j + 1) - 1, scale * (i + 1) - 1], "gray")

    def place(position):  # cell (i, j) is centred at (i - 0.2, j - 0.2)
        return scale * (position[1] + 0.7), scale * (position[0] + 0.7)

    y, x = place(goal_cell(maze))
    draw.ellipse([y - scale / 2, x - scale / 2, y + scale / 2, x + scale / 2], "palegreen")
    draw.ellipse([y - 3, x - 3, y + 3, x + 3], "green")
    return image, draw, place


def draw_lines(draw, place, trajectories, scale):
    for states in trajectories:
        for t in range(len(states) - 1):
            share = t / max(len(states) - 2, 1)
            colour = (round(255 * share), 0, round(255 * (1 - share)))
            # PIL draws all of a line, also outside the picture: minutes if a model has diverged
            ends = [tuple(np.clip(place(s), -10_000, 10_000)) for s in states[t : t + 2]]
            draw.line(ends, colour, width=max(1, scale // 80))


def view_trajectories(maze, trajectories, scale=80):
    """Top view with a line per trajectory, arrays (T, 4) in forward time, from blue (start) to red (end)."""
    image, draw, place = top_view(maze, scale)
    draw_lines(draw, place, trajectories, scale)
    y, x = place(goal_cell(maze))
    goal = [y - scale / 2, x - scale / 2, y + scale / 2, x + scale / 2]
    draw.ellipse(goal, outline="green", width=scale // 40)  # drawn last, so lines do not hide it
    return image


def view_states(maze, groups, scale=60):
    """Top views side by side, one per entry of `groups`, name -> states (N, 4), with a dot per state."""
    from PIL import Image

    views = []
    for (name, states), colour in zip(groups.items(), ("blue", "dimgray", "red"), strict=False):
        image, draw, place = top_view(maze, scale)
        for x, y in map(place, states):
            draw.ellipse([x - 1, y - 1, x + 1, y + 1], colour)
        draw.text((4, 4), name, "white")
        views.append(image)
    wide = Image.new("RGB", (sum(view.width for view in views), views[0].height))
    for i, view in enumerate(views):
        wide.paste(view, (i * view.width, 0))
    return wide


def replay_error(maze, obs, act, next_obs):
    """Replay imagined chains in the true simulator: obs, next_obs (C, h, 4), act (C, h, 2) in forward time.

    Returns two mean Euclidean distances between imagined and simulated state, over all four entries: after one step
    from each imagined state, and after all h steps from the first.
    """
    env = Maze2d(maze)
    return replay(env, lambda o: env.set_state(o[:2], o[2:]), obs, act, next_obs)


def replay(env, begin, obs, act, next_obs):
    """replay_error in an environment that `begin` sets to an imagined state (O,)."""
    one, all_steps = [], []
    for o, a, n in zip(obs, act, next_obs, strict=True):
        for t in range(len(a)):
            begin(o[t])
            one.append(np.linalg.norm(env.step(a[t])[0] - n[t]))
        begin(o[0])
        for t in range(len(a)):
            end = env.step(a[t])[0]
        all_steps.append(np.linalg.norm(end - n[-1]))
    return float(np.mean(one)), float(np.mean(all_steps))


for _maze in MAZES:
    for _dense in (False, True):
        gymnasium.register(
            f"Rewind/Maze2d-{_maze}{'-dense' * _dense}-v1",
            entry_point="envs.maze2d:Maze2d",
            kwargs={"maze": _maze, "dense": _dense},
            max_episode_steps=MAX_STEPS[_maze],
        )
