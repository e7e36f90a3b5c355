#!/usr/bin/env bash
# The ablation table: what each part of layer skipping is worth, on the same episodes as the full model.
# Usage: launch/ablations.sh DEMONSTRATIONS [OUT] [path of the dysl command]
# First it evaluates the shipped heads with parts switched off. Then it trains heads in other ways, and once as `dysl distill`
# does by default, each for STEPS steps, because only heads that were trained equally long can be compared. The same command
# continues where it was stopped. Variables: EPISODES of each task; WORKERS side by side (latencies need 1); SKIP, the setting.
set -eu
data=$1
out=${2:-runs/ablations}
dysl=${3:-dysl}
policy=metaworld-mini
episodes=${EPISODES:-20}
workers=${WORKERS:-1}
steps=${STEPS:-20000}
skip=${SKIP:-0.997}

"$dysl" eval --policy "$policy" --episodes "$episodes" --workers "$workers" --out "$out/parts" \
    --variants full,dysl,no-guidance,no-verification,controllers,random

train() {
    variant=$1
    shift
    "$dysl" distill --policy "$policy" --data "$data" --out "$out/$variant" --skip-steps "$steps" "$@"
    "$dysl" eval --policy "$out/$variant" --episodes "$episodes" --workers "$workers" \
        --out "$out/$variant-eval" --skip "$skip"
}
mkdir -p "$out"
echo '{"plan": {"num_layers": 24, "static_layers": [23]}}' > "$out/no-static-split.json"
echo '{"plan": {"num_layers": 24, "static_layers": [0, 12, 23]}}' > "$out/all-exits.json"
train default
train one-stage --adapter-steps 0
train all-exits --plan "$out/all-exits.json" --joint-exit-prob 0
train no-static-split --plan "$out/no-static-split.json"
"$dysl" eval compare "$out/parts/full" "$out"/parts/{dysl,no-guidance,no-verification,controllers,random} "$out"/*-eval
