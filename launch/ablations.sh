#!/usr/bin/env bash
# The ablation table: what each part of layer skipping is worth, on the same episodes as the full model.
# Usage: launch/ablations.sh DEMONSTRATIONS [OUT] [path of the dysl command]
# Three variants are trained differently, as long as the shipped one, and run at its setting of the knob; about two hours
# on two cores. It may be stopped: the same command goes on. STEPS and EPISODES make it shorter.
set -eu
data=$1
out=${2:-runs/ablations}
dysl=${3:-dysl}
policy=metaworld-mini
episodes=${EPISODES:-20}

"$dysl" eval --policy "$policy" --episodes "$episodes" --out "$out/parts" \
    --skip-config full,dysl,no-guidance,no-verification,controllers,random

train() {
    variant=$1
    shift
    "$dysl" distill --policy "$policy" --data "$data" --out "$out/$variant" \
        --skip-steps "${STEPS:-46000}" "$@"
    "$dysl" eval --policy "$out/$variant" --episodes "$episodes" --out "$out/$variant-eval"
}
mkdir -p "$out"
echo '{"plan": {"num_layers": 24, "static_layers": [23]}}' > "$out/no-static-split.json"
train no-static-split --plan "$out/no-static-split.json"
train one-stage --adapter-steps 0
train drawn-places --first-share 0 --together 0
"$dysl" eval compare "$out/parts/full" "$out"/parts/{dysl,no-guidance,no-verification,controllers,random} "$out"/*-eval
