#!/usr/bin/env bash
# The ablation table: what each part of layer skipping is worth, on the same episodes as the full model.
# Usage: launch/ablations.sh DEMONSTRATIONS [OUT] [path of the dysl command]
# Three variants are trained differently, as long as the shipped one, and run at the same setting of the knob; about two hours
# on two cores. It may be stopped: the same command goes on. STEPS and EPISODES make it shorter.
# SKIP is the shipped setting, of its skip.json.
set -eu
data=$1
out=${2:-runs/ablations}
dysl=${3:-dysl}
policy=metaworld-mini
episodes=${EPISODES:-20}
skip=${SKIP:-0.99}

"$dysl" eval --policy "$policy" --episodes "$episodes" --out "$out/parts" \
    --skip-config full,dysl,no-guidance,no-verification,controllers,random

train() {
    variant=$1
    shift
    "$dysl" distill --policy "$policy" --data "$data" --out "$out/$variant" \
        --skip-steps "${STEPS:-40000}" "$@"
    "$dysl" eval --policy "$out/$variant" --episodes "$episodes" --out "$out/$variant-eval" --skip "$skip"
}
mkdir -p "$out"
echo '{"plan": {"num_layers": 24, "static_layers": [23]}}' > "$out/no-static-split.json"
train no-static-split --plan "$out/no-static-split.json"
train one-stage --adapter-steps 0
echo '{"plan": {"num_layers": 24, "static_layers": [0, 12, 23]}}' > "$out/all-exits.json"
train all-exits --plan "$out/all-exits.json" --together 0
"$dysl" eval compare "$out/parts/full" "$out"/parts/{dysl,no-guidance,no-verification,controllers,random} "$out"/*-eval
