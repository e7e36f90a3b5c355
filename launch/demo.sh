#!/usr/bin/env bash
# The demonstration on the shipped policy: a check of the machine, then episodes of Meta-World's MT10, each with the full model
# and with the one that skips layers, in turn, and videos of them.
# Usage: launch/demo.sh [path of the dysl command]
set -eu
dysl=${1:-dysl}
out=runs/demo
rm -rf "$out"
"$dysl" doctor
"$dysl" eval --policy metaworld-mini --episodes 2 --workers 1 --variants full,dysl --video 1 --out "$out"
echo "Videos: $out/dysl/videos; one picture of them, with the layers that ran under each frame: $out/dysl/contact_sheet.png"
