"""A bundle on a robot that speaks ROS 2: an example to adapt. Topics and names are parameters of the node.

    source /opt/ros/jazzy/setup.bash
    python3 launch/ros2_control.py --ros-args -p bundle:=runs/bundle -p instruction:="open the drawer" \
        -p cameras:="['corner2:/camera/image_raw', 'gripperPOV:/wrist/image_raw']" -p rate_hz:=20.0

State comes as sensor_msgs/JointState, whose positions are named as the policy's state; actions go out as
std_msgs/Float64MultiArray. Bounds of the actions are parameters, too, and `dysl_vla.deploy.limits` applies them.

It has never run under ROS 2 itself: `tests/deploy/test_adapters.py` tries it with stand-ins for rclpy and its messages.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dysl_vla.deploy.control import ControlLoop
from dysl_vla.deploy.limits import Limits
from dysl_vla.deploy.loop_stats import render_stats
from dysl_vla.deploy.robot import TimedObservation, hold_action
from dysl_vla.deploy.runtime import Bundle
from dysl_vla.errors import ConfigError, DyslError, RobotFault
from dysl_vla.types import IMAGE_PREFIX, STATE_KEY, TASK_KEY, EmbodimentSpec, FloatArray, PolicySpec

ANSWER_S = 0.5


class Ros2Robot:
    """Implements `Robot` with topics.

    Args:
        node: A node of rclpy.
        messages: Classes of the messages by name: "Image", "JointState" and "Float64MultiArray".
        topics: Topics by camera name, and those of "state" and "action".
        spec: The policy's specification, which decides names and sizes.
        bounds: Smallest and largest action, a value for each dimension.
    """

    def __init__(
        self,
        node: Any,
        messages: Mapping[str, Any],
        topics: Mapping[str, str],
        spec: PolicySpec,
        bounds: tuple[tuple[float, ...], tuple[float, ...]],
    ) -> None:
        topics_needed = (*spec.cameras, "state", "action")
        missing = [name for name in topics_needed if name not in topics]
        if missing:
            raise ConfigError(f"cameras must name a topic for {', '.join(topics_needed)}; got none for {missing[0]!r}.")
        self.embodiment = EmbodimentSpec(
            cameras=spec.cameras,
            state_names=spec.state_names,
            action_names=spec.action_names,
            action_low=bounds[0],
            action_high=bounds[1],
            rate_hz=spec.rate_hz,
        )
        self._clock = node.get_clock()
        self._last: FloatArray | None = None
        self._message = messages["Float64MultiArray"]
        self._lock = threading.Condition()
        self._parts: dict[str, tuple[Any, float]] = {}
        self._publisher = node.create_publisher(messages["Float64MultiArray"], topics["action"], 1)
        for camera in spec.cameras:
            node.create_subscription(
                messages["Image"], topics[camera], lambda image, camera=camera: self._keep_image(camera, image), 1
            )
        node.create_subscription(messages["JointState"], topics["state"], self._keep_state, 1)

    def connect(self, rate_hz: float) -> None:
        """Wait for a message of each topic."""
        if rate_hz != self.embodiment.rate_hz:
            raise ConfigError(
                f"rate_hz must be the policy's {self.embodiment.rate_hz:g} actions a second, got {rate_hz:g}."
            )
        self.observe(-math.inf)

    def observe(self, after: float) -> TimedObservation:
        """See `Robot.observe`; a message was made when its stamp says."""
        wanted = [*(IMAGE_PREFIX + camera for camera in self.embodiment.cameras), STATE_KEY]
        with self._lock:
            limit = max(time.perf_counter(), after) + ANSWER_S
            while not all(name in self._parts and self._parts[name][1] > after for name in wanted):
                if not self._lock.wait(max(0.0, limit - time.perf_counter())):
                    late = [name for name in wanted if name not in self._parts or self._parts[name][1] <= after]
                    raise RobotFault(f"robot: nothing of {', '.join(late)} for {ANSWER_S:g} s; check their topics.")
            parts = {name: self._parts[name] for name in wanted}
        observation = {name: value for name, (value, _) in parts.items()}
        return TimedObservation({**observation, TASK_KEY: ""}, min(timestamp for _, timestamp in parts.values()))

    def act(self, action: FloatArray) -> None:
        """See `Robot.act`."""
        self._last = action
        self._publisher.publish(self._message(data=action.astype(float).tolist()))

    def hold(self, last: FloatArray | None) -> FloatArray | None:
        """See `hold_action`: before the first command, positions are where the joints are. Torques need their own."""
        with self._lock:
            state = self._parts[STATE_KEY][0].tolist() if STATE_KEY in self._parts else []
        return hold_action(self.embodiment, last, dict(zip(self.embodiment.state_names, state, strict=False)))

    def report(self) -> dict[str, Any]:
        """Nothing: topics keep no record."""
        return {}

    def stop(self) -> None:
        """Hold once more, if it was moved; the robot's own controller stops when no command follows."""
        try:
            if self._last is not None and (held := self.hold(self._last)) is not None:
                self.act(held)
        except Exception as error:  # stopping must not raise
            print(f"robot: could not publish the last command ({error}).", file=sys.stderr)

    def _keep_image(self, camera: str, image: Any) -> None:
        height, width = self.embodiment.cameras[camera]
        if image.encoding != "rgb8" or (image.height, image.width) != (height, width):
            return  # the loop stops for want of an observation, and names the camera
        rows = np.frombuffer(bytes(image.data), np.uint8).reshape(height, image.step)
        self._keep(IMAGE_PREFIX + camera, rows[:, : 3 * width].reshape(height, width, 3), image.header.stamp)

    def _keep_state(self, joints: Any) -> None:
        positions = dict(zip(joints.name, joints.position, strict=False))  # some messages hold velocities alone
        if set(self.embodiment.state_names) <= set(positions):
            state = np.array([positions[name] for name in self.embodiment.state_names], np.float32)
            self._keep(STATE_KEY, state, joints.header.stamp)

    def _keep(self, name: str, value: Any, stamp: Any) -> None:
        age = 1e-9 * self._clock.now().nanoseconds - (stamp.sec + 1e-9 * stamp.nanosec)
        with self._lock:
            self._parts[name] = value, time.perf_counter() - age  # a stamp of another clock stops the robot
            self._lock.notify_all()


def main() -> int:
    """Run as a node."""
    import rclpy
    from sensor_msgs.msg import Image, JointState
    from std_msgs.msg import Float64MultiArray

    rclpy.init()
    node = rclpy.create_node("dysl_control")

    def parameter(name: str, default: Any) -> Any:
        return node.declare_parameter(name, default).value

    try:
        bundle = Bundle(Path(parameter("bundle", "bundle")))
        topics = dict(text.partition(":")[::2] for text in parameter("cameras", [""]))
        topics |= {"state": parameter("state", "/joint_states"), "action": parameter("action", "/dysl/action")}
        dim = len(bundle.spec.action_names)
        bounds = tuple(parameter("action_low", [-1.0] * dim)), tuple(parameter("action_high", [1.0] * dim))
        messages = {"Image": Image, "JointState": JointState, "Float64MultiArray": Float64MultiArray}
        robot = Ros2Robot(node, messages, topics, bundle.spec, bounds)
        threading.Thread(target=rclpy.spin, args=(node,), daemon=True).start()
        rate_hz = float(parameter("rate_hz", bundle.spec.rate_hz))
        loop = ControlLoop(bundle, robot, rate_hz, Limits(), instruction=parameter("instruction", ""))
        print(render_stats(loop.run(float(parameter("seconds", 60.0)))))
    except DyslError as error:
        print(f"dysl_control: {error}", file=sys.stderr)
        return 2
    finally:
        node.destroy_node()
        rclpy.try_shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
