"""`dysl control view`: turns a control log into a recording for Rerun's viewer."""

from __future__ import annotations

from pathlib import Path

from dysl_vla.deploy.cycle_log import check_number, read_log
from dysl_vla.extras import needs_extra


def view(folder: Path, out: Path | None = None) -> Path:
    """Write a log as a recording that Rerun's viewer opens.

    Args:
        folder: Folder of `dysl control --log`.
        out: File of the recording; None: `cycles.rrd` beside the log.

    Returns:
        The file of the recording.

    Raises:
        ConfigError: There is no log.
        MissingExtraError: Rerun is not installed.
    """
    with needs_extra("viz"):
        import rerun
    stats, lines = read_log(folder)
    out = out or folder / "cycles.rrd"
    recording = rerun.new_recording("dysl control")
    names = stats.get("action_names", [])
    state_names = stats.get("state_names", [])
    for number, line in enumerate(lines, start=1):
        check_number(folder, number, line, "jitter_ms")
        rerun.set_time_seconds("control", line["due_s"], recording=recording)

        def scalar(path: str, value: float) -> None:
            rerun.log(path, rerun.Scalar(value), recording=recording)

        scalar("schedule/sent_after_its_time_ms", line["jitter_ms"])
        for index, value in enumerate(line.get("action") or ()):
            scalar(f"action/{names[index] if names else index}", value)
        for index, value in enumerate(line.get("state") or ()):
            scalar(f"state/{state_names[index] if state_names else index}", value)
        if "age_ms" in line:
            scalar("schedule/age_of_observation_ms", line["age_ms"])
        inference = line.get("inference")
        if inference:
            scalar("inference/ms", inference["inference_ms"])
            if "layers" in inference:
                scalar("inference/layers", inference["layers"])
        if line.get("status") != "on_time" or line.get("breaches"):
            text = f"cycle {line.get('cycle')}: {line.get('status')} {' '.join(line.get('breaches', ()))}"
            rerun.log("events", rerun.TextLog(text), recording=recording)
    rerun.save(out, recording=recording)
    return out
