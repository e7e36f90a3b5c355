#!/usr/bin/env bash
# The main job on the shipped policy: a minute of checks, then real episodes of Meta-World's MT10 with films of them.
# Usage: launch/demo.sh [path of the dysl command]
set -eu
dysl=${1:-dysl}
out=runs/demo
rm -rf "$out"
"$dysl" doctor
"$dysl" eval --policy metaworld-mini --suite metaworld-mt10 --episodes 3 --seed 100000 --workers 2 --video 1 --out "$out"
echo "Films: $out/videos, and on one picture: $out/films.png"
