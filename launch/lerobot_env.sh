#!/usr/bin/env bash
# A virtual environment with LeRobot, the driver of an SO-101, and this package: for `dysl control --robot lerobot:...`
# and for tests/lerobot. LeRobot needs Python 3.12 and versions of its own, so it cannot share the other environment.
#
#   bash launch/lerobot_env.sh               says which Python it would take
#   bash launch/lerobot_env.sh DIR [PYTHON]  makes it in DIR; does nothing where it is made already
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

fits() { "$1" -c 'import sys; sys.exit(not (3, 12) <= sys.version_info < (3, 14))' 2>/dev/null; }

find_python() {
    local candidate
    for candidate in python3.12 python3.13 "$HOME"/.pyenv/versions/3.1[23]*/bin/python; do
        if fits "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    echo "lerobot_env: LeRobot needs Python 3.12 or 3.13, and none was found; install one, or name it:" \
        "bash launch/lerobot_env.sh DIR PYTHON" >&2
    return 1
}

if [ "${2:-}" ] && ! fits "$2"; then
    echo "lerobot_env: $2 is not a Python 3.12 or 3.13, which LeRobot needs" >&2
    exit 1
fi
folder="${1:-}"
if [ -z "$folder" ]; then
    find_python
    exit
fi
stamp="$folder/.installed"
if [ "$stamp" -nt "$here/pyproject.toml" ] && [ "$stamp" -nt "${BASH_SOURCE[0]}" ]; then
    exit
fi
python="${2:-$(find_python)}"
"$python" -m venv "$folder"
pip=("$folder/bin/python" -m pip --disable-pip-version-check install)
# Without a GPU, torch's own index has builds that are gigabytes smaller. These two alone are looked for there: where it
# cannot be reached, pip tries for long, and then goes on without.
cpu_index=()
command -v nvidia-smi >/dev/null || cpu_index=(--extra-index-url https://download.pytorch.org/whl/cpu)
"${pip[@]}" --no-deps "${cpu_index[@]}" 'torch>=2.7,<2.12' 'torchvision>=0.22,<0.27'
"${pip[@]}" 'lerobot[dataset,feetech]==0.6.1' --editable "$here[train,export]" hypothesis pytest
touch "$stamp"
